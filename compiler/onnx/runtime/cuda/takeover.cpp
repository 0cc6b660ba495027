#include "takeover.hpp"

#include <stdlib.h>

#include <initializer_list>

#include "../status.hpp"
#include "src/plan.hpp"
#include "transfer.hpp"

namespace sage_ort {
namespace {

using sage_cpu::Carver;

// Host memory. The session's own arena is not at hand where its kernels are a device's.
OrtAllocator host_memory = {
    kApiVersion,
    [](OrtAllocator*, size_t bytes) { return malloc(bytes); },
    [](OrtAllocator*, void* memory) { free(memory); },
    nullptr,
};

// The bytes of a mask, from its strides. It is dense, so that the index after its last element is
// how many there are; 0 also where a dim is 0.
int64_t mask_bytes(const Call& call) {
    const int64_t full[4] = {call.batch, call.heads, call.query_length, call.key_length};
    int64_t count = 1;
    for (size_t i = 0; i < 4; i++) count += (full[i] - 1) * call.mask.stride[i];
    return count * element_size(call.mask.dtype);
}

// A tensor, on the device and here.
struct Staged {
    void* device;  // null: not given
    char* host;
    int64_t bytes;

    Staged(Carver& carver, const void* on_device, int64_t size)
        : device(const_cast<void*>(on_device)),
          host(nullptr),
          bytes(on_device == nullptr ? 0 : size) {
        if (device != nullptr) host = carver.take<char>(bytes);
    }
};

struct StagedCall {
    Staged query, key, value, mask, sinks, output, lse;

    StagedCall(Carver& carver, const Call& c)
        : query(carver, c.query,
                c.batch * c.heads * c.query_length * c.head_dim * element_size(c.dtype)),
          key(carver, c.key,
              c.batch * c.kv_heads * c.key_length * c.head_dim * element_size(c.dtype)),
          value(carver, c.value,
                c.batch * c.kv_heads * c.key_length * c.value_head_dim * element_size(c.dtype)),
          mask(carver, c.mask.data, c.mask.data == nullptr ? 0 : mask_bytes(c)),
          sinks(carver, c.sinks, c.heads * element_size(c.sinks_dtype)),
          output(carver, c.output,
                 c.batch * c.heads * c.query_length * c.value_head_dim * element_size(c.dtype)),
          lse(carver, c.lse, c.batch * c.heads * c.query_length * int64_t(sizeof *c.lse)) {}

    // The call on what is here.
    Call here(const Call& on_device) const {
        Call call = on_device;
        call.query = query.host;
        call.key = key.host;
        call.value = value.host;
        call.mask.data = mask.host;
        call.sinks = sinks.host;
        call.output = output.host;
        call.lse = reinterpret_cast<float*>(lse.host);
        return call;
    }

    bool read(sage_cuda::Transfer& transfer, sage_cuda::Error& error) const {
        for (const Staged* input : {&query, &key, &value, &mask, &sinks})
            if (!transfer.read(input->host, input->device, size_t(input->bytes), error))
                return false;
        return transfer.wait(error);
    }

    bool write(sage_cuda::Transfer& transfer, sage_cuda::Error& error) const {
        for (const Staged* result : {&output, &lse})
            if (!transfer.write(result->device, result->host, size_t(result->bytes), error))
                return false;
        return transfer.wait(error);
    }
};

}  // namespace

OrtStatus* take_over(const OrtApi& api, const OrtKernelContext* context, const Node& node,
                     const Call& call, const Gate* gate, const sage_cuda::Driver& driver,
                     sage_cuda::CUstream stream) {
    SAGE_ORT_TRY(check_cpu(api));
    Carver measured{nullptr};
    StagedCall(measured, call);
    Scratch scratch(&host_memory);  // before the transfer, which may still use it at its end
    sage_cuda::Error error;
    sage_cuda::Transfer transfer(driver, stream, error);
    if (!transfer.ok()) return refuse(api, ORT_FAIL, "%s", error.text);
    Carver carver{scratch.allocate(measured.used)};
    if (carver.base == nullptr)
        return refuse(api, ORT_FAIL, "no memory on the host for tensors of %lld bytes",
                      static_cast<long long>(measured.used));
    const StagedCall staged(carver, call);

    if (!staged.read(transfer, error)) return refuse(api, ORT_FAIL, "%s", error.text);
    Threads threads(api, context, cpu_count());
    SAGE_ORT_TRY(attend({api, node, threads, &host_memory}, staged.here(call), gate));
    return staged.write(transfer, error) ? nullptr : refuse(api, ORT_FAIL, "%s", error.text);
}

}  // namespace sage_ort
