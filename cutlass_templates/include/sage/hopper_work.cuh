// Whose tasks a persistent grid does: those of one call, or of the sequences of a packed batch. The
// producer finds a task, and says in shared memory what it is.
//
// A kind of work has
//
//   Params                                 Of the launch.
//   AttendParams const& call(Params const& p)
//   kWords                                 That say what a task is, besides its index.
//   int find(Params const& p, int position, int* words)
//                                          The task at a position of the order, and its words;
//                                          negative: there is nothing to do.
//   Work(Params const& p, int const* words)
//   params()                               What the task is one of: an attention of its own.
//   void refresh(Params const& p, int const* words)     Anew, so that what it is takes no registers
//                                          in between.
#pragma once

#include <sage/hopper_deal.cuh>
#include <sage/varlen.cuh>

namespace sage {

// Task as of task_at.
template <class Task, class OfCall = AttendParams>
class WorkOfCall {
 public:
    using Params = OfCall;
    static constexpr int kWords = 0;

    SAGE_DEVICE static AttendParams const& call(Params const& p) { return p; }

    SAGE_DEVICE static int find(Params const& p, int position, int*) {
        return task_at<Task>(p, position);
    }

    SAGE_DEVICE WorkOfCall(Params const& p, int const*) : p_(p) {}
    SAGE_DEVICE Params const& params() const { return p_; }
    SAGE_DEVICE void refresh(Params const&, int const*) {}

 private:
    Params const& p_;
};

// Narrow makes of the parameters of the launch those of a sequence, as narrow_attend. Only the
// producer looks for sequences; parameters are made wherever they are needed, of what it found.
template <class Narrow>
class WorkOfSequences {
 public:
    struct Params {
        AttendParams call;
        Sequences sequences;
    };
    static constexpr int kWords = Sequence::kWords;

    SAGE_DEVICE static AttendParams const& call(Params const& p) { return p.call; }

    SAGE_DEVICE static int find(Params const& p, int position, int* words) {
        Sequence const sequence = attended_sequence(p.call, p.sequences, position);
        sequence.store_shared(words);
        return static_cast<int>(attended_task(p.call, sequence, position));
    }

    SAGE_DEVICE WorkOfSequences(Params const& p, int const* words) { refresh(p, words); }
    SAGE_DEVICE AttendParams const& params() const { return params_; }
    SAGE_DEVICE void refresh(Params const& p, int const* words) {
        params_ = p.call;
        Narrow::narrow(params_, p.sequences, Sequence(p.sequences, words));
    }

 private:
    AttendParams params_;
};

}  // namespace sage
