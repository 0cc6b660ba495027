// Attention in double precision, and how far a recipe may be from it, element by element.
//
// What a recipe may differ by (docs/numerics.md has its steps, u = 2^-24):
//
//   scores  Rounding errors of a token's elements are independent and uniform in +-1/2 step. So the
//           error of q . k' has the standard deviation
//               sqrt(step_q^2 |k'|^2 / 12 + step_k^2 |q|^2 / 12 + D (step_q step_k / 12)^2)
//           and 8 of these bound what all runs together will see; the sum of the greatest errors
//           bounds it always, and alone where one element stands for all channels. Float32 sums
//           of D terms add D u times the sum of magnitudes.
//   P       half a step relative to the block's maximum, and no more than P itself, since what is
//           below half a step becomes zero; the approximation of exp2 a part of P
//   V       half a step of its channel in the block
//
// To first order these move o_i by sum_j dp_j (v_j - o_i) / Z; dividing by 1 - sum_j dp_j / Z
// covers the rest. No output leaves the range of the visible V by more than the rounding of V.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "tensor.hpp"

namespace fuzz {

struct Call {
    sage_cpu_problem problem;
    Dense query, key, value, bias;  // bias: of (B, H, Lq, Lk), -inf where a mask hides
    std::vector<double> sinks;      // empty: none
    bool packed;                    // statistics know neither mask nor band
    bool uniform_channels;          // some head_dim stride is 0
};

struct Expected {
    Dense output, output_tolerance;  // (B, H, Lq, Dv); not finite: anything that is not finite
    Dense lse, lse_tolerance;        // (B, H, Lq, 1)
    Dense may_be_nan;                // (B, H, Lq, 1): NaN or infinity in what the row may depend on
};

class Naive {
 public:
    explicit Naive(Call& call) : call_(call), p_(call.problem) {
        result_.output = result_.output_tolerance =
            Dense(p_.batch, p_.heads, p_.query_length, p_.value_head_dim);
        result_.lse = result_.lse_tolerance = result_.may_be_nan =
            Dense(p_.batch, p_.heads, p_.query_length, 1);
        for (int64_t b = 0; b < p_.batch; ++b)
            for (int64_t g = 0; g < p_.kv_heads; ++g) group(b, g);
    }

    Expected result_;

 private:
    static constexpr int64_t kBlock = 256;
    static constexpr double kUnit = 0x1p-24;
    static constexpr double kNegligibleBias = -5000;
    static constexpr double kLargestMask = 1e30;  // absorbs every score

    bool quantized() const { return p_.recipe != SAGE_CPU_FLOAT; }

    bool in_band(int64_t i, int64_t j) const {
        __int128 offset = __int128(j) - i - p_.diagonal;
        return (p_.window_left < 0 || offset >= -__int128(p_.window_left)) &&
               (p_.window_right < 0 || offset <= p_.window_right);
    }
    bool visible(int64_t b, int64_t h, int64_t i, int64_t j) {
        return in_band(i, j) && call_.bias.at(b, h, i, j) != -INFINITY;
    }

    // One key/value head: what its queries see, the statistics, and then every row.
    void group(int64_t b, int64_t g) {
        look(b, g);
        measure(b, g);
        int64_t heads = p_.heads / p_.kv_heads;
        for (int64_t h = g * heads; h < (g + 1) * heads; ++h)
            for (int64_t i = 0; i < p_.query_length; ++i) row(b, g, h, i);
    }

    void look(int64_t b, int64_t g) {
        reachable_.assign(p_.key_length, call_.packed);
        counted_ = reachable_;
        if (call_.packed) return;
        int64_t heads = p_.heads / p_.kv_heads;
        for (int64_t h = g * heads; h < (g + 1) * heads; ++h) {
            for (int64_t i = 0; i < p_.query_length; ++i) {
                bool discerning = false;
                for (int64_t j = 0; j < p_.key_length; ++j)
                    discerning |=
                        visible(b, h, i, j) && !(call_.bias.at(b, h, i, j) <= kNegligibleBias);
                for (int64_t j = 0; j < p_.key_length; ++j) {
                    if (!visible(b, h, i, j)) continue;
                    reachable_[j] = true;
                    if (!discerning || !(call_.bias.at(b, h, i, j) <= kNegligibleBias))
                        counted_[j] = true;
                }
            }
        }
        for (int64_t start = 0; start < p_.key_length; start += kBlock) {
            auto from = counted_.begin() + start;
            auto to = counted_.begin() + std::min(start + kBlock, p_.key_length);
            if (std::find(from, to, true) == to)
                std::copy(reachable_.begin() + start, reachable_.begin() + (to - counted_.begin()),
                          from);
        }
    }

    void measure(int64_t b, int64_t g) {
        int64_t blocks = (p_.key_length + kBlock - 1) / kBlock;
        mean_.assign(blocks * p_.head_dim, 0);
        value_step_.assign(blocks * p_.value_head_dim, 0);
        smooth_.assign(p_.key_length * p_.head_dim, 0);
        key_step_.assign(p_.key_length, 0);
        tainted_ = false;
        for (int64_t j = 0; j < p_.key_length; ++j) {
            if (!reachable_[j]) continue;
            for (int64_t d = 0; d < p_.head_dim; ++d)
                tainted_ |= !std::isfinite(call_.key.at(b, g, j, d));
            for (int64_t d = 0; d < p_.value_head_dim; ++d)
                tainted_ |= !std::isfinite(call_.value.at(b, g, j, d));
        }
        for (int64_t block = 0; block < blocks; ++block) {
            int64_t start = block * kBlock, stop = std::min(start + kBlock, p_.key_length);
            int64_t count = 0;
            double* mean = &mean_[block * p_.head_dim];
            for (int64_t j = start; j < stop; ++j) {
                if (!counted_[j]) continue;
                ++count;
                for (int64_t d = 0; d < p_.head_dim; ++d) mean[d] += call_.key.at(b, g, j, d);
            }
            for (int64_t d = 0; d < p_.head_dim; ++d)
                mean[d] /= double(std::max<int64_t>(count, 1));
            for (int64_t j = start; j < stop; ++j) {
                double largest = 0;
                for (int64_t d = 0; d < p_.head_dim; ++d) {
                    double k = call_.key.at(b, g, j, d) - mean[d];
                    smooth_[j * p_.head_dim + d] = k;
                    largest = std::max(largest, std::fabs(k));
                }
                key_step_[j] = largest / 127;
            }
            for (int64_t d = 0; d < p_.value_head_dim; ++d) {
                double low = INFINITY, high = -INFINITY;
                for (int64_t j = start; j < stop; ++j) {
                    if (!counted_[j]) continue;
                    low = std::min(low, call_.value.at(b, g, j, d));
                    high = std::max(high, call_.value.at(b, g, j, d));
                }
                value_step_[block * p_.value_head_dim + d] = count == 0 ? 0 : (high - low) / 254;
            }
        }
    }

    struct Score {
        int64_t key;
        double score, error;
        double weight, weight_error;  // relative to the row's maximum
    };

    double round_trip(double x) const { return std::fabs(x) * kUnit; }

    Score score(int64_t b, int64_t h, int64_t i, int64_t j, double query_step) {
        const double* q = call_.query.row(b, h, i);
        const double* k = call_.key.row(b, h / (p_.heads / p_.kv_heads), j);
        const double* smooth = &smooth_[j * p_.head_dim];
        const double* mean = &mean_[j / kBlock * p_.head_dim];
        double dot = 0, q1 = 0, k1 = 0, q2 = 0, k2 = 0, magnitude = 0;
        for (int64_t d = 0; d < p_.head_dim; ++d) {
            dot += q[d] * k[d];
            q1 += std::fabs(q[d]);
            k1 += std::fabs(smooth[d]);
            q2 += q[d] * q[d];
            k2 += smooth[d] * smooth[d];
            magnitude += std::fabs(q[d]) * (std::fabs(k[d]) + std::fabs(mean[d]));
        }
        double scale = std::fabs(double(p_.scale)), channels = double(p_.head_dim);
        double error = scale * magnitude * (channels + 16) * kUnit;
        if (quantized()) {
            double key_step = key_step_[j];
            double greatest =
                (query_step * k1 + key_step * q1) / 2 + channels * query_step * key_step / 4;
            double deviation =
                std::sqrt((query_step * query_step * k2 + key_step * key_step * q2) / 12 +
                          channels * std::pow(query_step * key_step / 12, 2));
            double rounding = call_.uniform_channels ? greatest : std::min(greatest, 8 * deviation);
            // A key that does not count is clipped: anything, but it has no weight.
            error += scale * (counted_[j] ? rounding : greatest + 2 * q1 * 127 * key_step);
        }
        double result = p_.scale * dot;
        if (p_.softcap != 0) {
            result = p_.softcap * std::tanh(result / p_.softcap);
            error += p_.softcap * 16 * kUnit;
        }
        double bias = call_.bias.at(b, h, i, j);
        // finfo.min takes the scores of a row away, their errors too.
        if (std::fabs(bias) > kLargestMask)
            error = 0;
        else
            error += 16 * kUnit * (std::fabs(result) + std::fabs(bias));
        return {j, result + bias, error, 0, 0};
    }

    void row(int64_t b, int64_t g, int64_t h, int64_t i) {
        std::vector<Score> scores;
        double largest = 0;
        bool tainted = tainted_;
        for (int64_t d = 0; d < p_.head_dim; ++d) {
            double q = call_.query.at(b, h, i, d);
            tainted |= !std::isfinite(q);
            largest = std::max(largest, std::fabs(q));
        }
        for (int64_t j = 0; j < p_.key_length; ++j)
            if (visible(b, h, i, j)) scores.push_back(score(b, h, i, j, largest / 127));

        double sink = call_.sinks.empty() ? -INFINITY : call_.sinks[h];
        if (sink == INFINITY) sink = NAN;
        double maximum = -INFINITY, bias_only = 0;
        std::vector<double> block_maximum((p_.key_length + kBlock - 1) / kBlock, -INFINITY);
        for (const Score& s : scores) {
            bias_only += call_.bias.at(b, h, i, s.key) * 0;  // NaN where a bias is not finite
            if (!(s.score <= maximum)) maximum = s.score;
            double& of_block = block_maximum[s.key / kBlock];
            if (!(s.score <= of_block)) of_block = s.score;
        }
        double origin = std::isnan(sink) || sink > maximum ? sink : maximum;
        double* output = &result_.output.at(b, h, i, 0);
        double* tolerance = &result_.output_tolerance.at(b, h, i, 0);
        double& lse = result_.lse.at(b, h, i, 0);
        if (scores.empty()) {
            bool nan =
                p_.key_length != 0 &&
                (std::isnan(sink) || (sink == -INFINITY && p_.dead_rows == SAGE_CPU_DEAD_NAN));
            std::fill_n(output, p_.value_head_dim, nan ? NAN : 0.0);
            lse = sink;
            result_.lse_tolerance.at(b, h, i, 0) = 4 * round_trip(sink);
            // A NaN score stays NaN under a bias of -inf, as in SDPA.
            result_.may_be_nan.at(b, h, i, 0) = tainted_;
            return;
        }

        // exp2 is a polynomial: of a degree that goes with the levels of P.
        double half_step = 0, relative = 16 * kUnit;
        if (p_.recipe == SAGE_CPU_INT8_INT8) half_step = 0.5 / 255, relative = 1e-3;
        if (p_.recipe == SAGE_CPU_INT8_INT16) half_step = 0.5 / 65535, relative = 1e-4;
        double sink_weight = sink == -INFINITY ? 0 : std::exp(sink - origin);
        // The difference of two logarithms of this size, each rounded.
        double sink_error = sink_weight == 0
                                ? 0
                                : 16 * kUnit + 4 * round_trip(std::fabs(sink) + std::fabs(maximum));
        double sum = sink_weight, sum_error = sink_weight * sink_error, greatest_error = 0;
        for (Score& s : scores) {
            double block = block_maximum[s.key / kBlock];
            s.weight = std::exp(s.score - origin);
            double rounded = std::min(half_step * 1.3 * std::exp(block - origin), s.weight);
            s.weight_error = s.weight * (std::expm1(s.error) + relative) + rounded;
            if (s.weight == 0) s.weight_error = 0;
            sum += s.weight;
            sum_error += s.weight_error;
            greatest_error = std::max(greatest_error, s.error);
        }
        double moved = sum_error / sum;
        lse = origin + std::log(sum);
        double downward = moved < 1 ? -std::log1p(-moved) : INFINITY;
        result_.lse_tolerance.at(b, h, i, 0) =
            std::min(downward, std::log(sum) + origin - maximum + greatest_error + 0.01) +
            round_trip(lse) * 16 + 1e-6;
        if (std::fabs(lse) > kLargestMask)
            result_.lse_tolerance.at(b, h, i, 0) = std::fabs(lse) / 2;
        result_.may_be_nan.at(b, h, i, 0) = tainted || std::isnan(bias_only) || std::isnan(sink);

        double terms = double(scores.size()) + 16;
        for (int64_t d = 0; d < p_.value_head_dim; ++d) {
            double total = 0, magnitude = 0, step = 0, range = 0, shift = 0;
            for (const Score& s : scores) {
                double v = call_.value.at(b, g, s.key, d);
                total += s.weight * v;
                magnitude += s.weight * std::fabs(v);
                if (quantized())
                    step += s.weight * value_step_[s.key / kBlock * p_.value_head_dim + d];
            }
            output[d] = total / sum;
            for (const Score& s : scores) {
                double v = call_.value.at(b, g, s.key, d);
                shift += s.weight_error * std::fabs(v - output[d]);
                range = std::max(range, std::fabs(v - output[d]));
            }
            if (sink_weight > 0) {
                shift += sink_weight * sink_error * std::fabs(output[d]);
                range = std::max(range, std::fabs(output[d]));
            }
            double moved_by = moved < 1 ? shift / sum / (1 - moved) : INFINITY;
            // Float32 sums of P V, and of V's offset with what is left of V.
            double sums =
                terms * kUnit * magnitude / sum + 4 * kUnit * largest_value(scores, b, g, d);
            tolerance[d] =
                std::min(moved_by, range) + step / sum * 0.51 + sums + output_rounding(output[d]);
        }
    }

    double largest_value(const std::vector<Score>& scores, int64_t b, int64_t g, int64_t d) {
        double largest = 0;
        for (const Score& s : scores)
            largest = std::max(largest, std::fabs(call_.value.at(b, g, s.key, d)));
        return largest;
    }

    double output_rounding(double x) const {
        switch (p_.dtype) {
            case SAGE_CPU_BFLOAT16:
                return std::fabs(x) * 0x1p-8;
            case SAGE_CPU_FLOAT16:
                return std::fabs(x) * 0x1p-10 + 0x1p-24;
        }
        return std::fabs(x) * 2 * kUnit + 1e-37;
    }

    Call& call_;
    const sage_cpu_problem& p_;
    // Of the key/value head at hand.
    std::vector<char> reachable_, counted_;
    std::vector<double> mean_, smooth_, key_step_, value_step_;
    bool tainted_ = false;
};

}  // namespace fuzz
