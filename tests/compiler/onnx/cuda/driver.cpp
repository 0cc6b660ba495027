// A CUDA driver for tests: it notes what is asked of it, fails where it is told to, and hands the
// rest on to the look-alike of cutlass_templates/host, or pretends that it was done.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <sage/params.cuh>
#include <string>
#include <vector>

namespace {

struct Launch {
    std::string symbol;
    unsigned grid, block, shared_bytes;
    void* stream;
    bool dependent;
    std::string params;
};

// As cuda.h has it.
struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z;
    unsigned block_x, block_y, block_z;
    unsigned shared_bytes;
    void* stream;
    struct Attribute {
        int id, pad, value;
    } const* attributes;
    unsigned attribute_count;
};

struct Copy {
    void* to;
    void const* from;
    size_t bytes;
    void* stream;
};

struct State {
    std::mutex mutex;
    void* target = nullptr;  // null: pretend
    int major = 8, minor = 9;
    int version = 12040;
    std::map<std::string, int> calls;
    std::string failing;
    int code = 0, after = 0;
    long contexts = 0, modules = 0, handles = 0;
    std::vector<Copy> copies;  // begun; done when somebody waits for their stream
    std::map<void*, std::string> functions;
    std::vector<Launch> launches;
};

State& state() {
    static State instance;
    return instance;
}

thread_local int depth = 0;  // of contexts that are current

// Whether a call is to fail, and with what.
bool fails(char const* name, int* code) {
    std::lock_guard<std::mutex> const lock(state().mutex);
    int const count = state().calls[name]++;
    *code = state().code;
    return state().failing == name && count >= state().after;
}

size_t params_bytes(std::string const& symbol) {
    auto const is = [&](char const* kind) { return symbol.rfind(kind, 0) == 0; };
    if (is("sage_quantize_")) return sizeof(sage::QuantizeParams<>);
    bool const copies_mask = is("sage_attend_hopper_") && symbol.substr(symbol.size() - 2) != "_0";
    if (copies_mask) return sizeof(sage::MaskedAttendParams);
    if (is("sage_attend_")) return sizeof(sage::AttendParams);
    if (is("sage_mask_rows_")) return sizeof(sage::MaskRowsParams);
    if (is("sage_mask_keys_")) return sizeof(sage::MaskKeysParams);
    if (is("sage_mask_counts_")) return sizeof(sage::MaskCountsParams);
    if (is("sage_sinks_")) return sizeof(sage::SinksParams);
    return 0;
}

void note_launch(void* function, LaunchConfig const& config, bool dependent, void** params) {
    std::lock_guard<std::mutex> const lock(state().mutex);
    std::string const& symbol = state().functions[function];
    std::string const packed(static_cast<char const*>(params[0]), params_bytes(symbol));
    state().launches.push_back({symbol, config.grid_x, config.block_x, config.shared_bytes,
                                config.stream, dependent, packed});
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// Calls the look-alike's function of this name, unless it is to fail or there is none.
#define FORWARD(name, signature, ...)         \
    int result = 0;                           \
    if (fails(#name, &result)) return result; \
    result = 0;                               \
    if (state().target != nullptr)            \
    result = reinterpret_cast<int(*) signature>(dlsym(state().target, #name))(__VA_ARGS__)

API int cuInit(unsigned flags) {
    FORWARD(cuInit, (unsigned), flags);
    return result;
}

API int cuDriverGetVersion(int* version) {
    *version = state().version;
    return 0;
}

API int cuGetErrorName(int code, char const** text) {
    *text = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OF_A_TEST";
    return code == 12345;  // a code that nobody knows
}

API int cuGetErrorString(int code, char const** text) {
    *text = code == 12345 ? nullptr : "as a test wanted";
    return 0;
}

API int cuDeviceGetCount(int* count) {
    *count = 1;
    FORWARD(cuDeviceGetCount, (int*), count);
    return result;
}

API int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    FORWARD(cuDeviceGet, (int*, int), device, ordinal);
    return result;
}

API int cuDeviceGetAttribute(int* value, int attribute, int device) {
    constexpr int kMultiprocessors = 20;  // as test_choice.py has it
    *value = attribute == 16 ? kMultiprocessors : attribute == 75 ? state().major : state().minor;
    FORWARD(cuDeviceGetAttribute, (int*, int, int), value, attribute, device);
    return result;
}

API int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = &state();
    FORWARD(cuDevicePrimaryCtxRetain, (void**, int), context, device);
    state().contexts += result == 0;
    return result;
}

API int cuDevicePrimaryCtxRelease_v2(int device) {
    state().contexts--;
    FORWARD(cuDevicePrimaryCtxRelease_v2, (int), device);
    return result;
}

API int cuCtxPushCurrent_v2(void* context) {
    FORWARD(cuCtxPushCurrent_v2, (void*), context);
    depth += result == 0;
    return result;
}

API int cuCtxPopCurrent_v2(void** context) {
    depth--;
    FORWARD(cuCtxPopCurrent_v2, (void**), context);
    return result;
}

API int cuModuleLoadData(void** module, void const* image) {
    *module = &state();
    if (state().target == nullptr) usleep(1000);  // for other threads to come
    FORWARD(cuModuleLoadData, (void**, void const*), module, image);
    state().modules += result == 0;
    return result;
}

API int cuModuleUnload(void* module) {
    state().modules--;
    FORWARD(cuModuleUnload, (void*), module);
    return result;
}

API int cuModuleGetFunction(void** function, void* module, char const* name) {
    *function = reinterpret_cast<void*>(static_cast<uintptr_t>(++state().handles));
    FORWARD(cuModuleGetFunction, (void**, void*, char const*), function, module, name);
    std::lock_guard<std::mutex> const lock(state().mutex);
    state().functions[*function] = name;
    return result;
}

API int cuFuncSetAttribute(void* function, int attribute, int value) {
    FORWARD(cuFuncSetAttribute, (void*, int, int), function, attribute, value);
    return result;
}

API int cuStreamIsCapturing(void* stream, int* status) {
    *status = 0;
    FORWARD(cuStreamIsCapturing, (void*, int*), stream, status);
    return result;
}

API int cuThreadExchangeStreamCaptureMode(int* mode) {
    FORWARD(cuThreadExchangeStreamCaptureMode, (int*), mode);
    return result;
}

// Streams, and copies, are this driver's alone, and a device's memory is the host's.
API int cuStreamGetCtx(void* stream, void** context) {
    int result = 0;
    if (fails("cuStreamGetCtx", &result)) return result;
    *context = stream == nullptr ? nullptr : &state();
    return 0;
}

static int begin_copy(char const* name, void* to, void const* from, size_t bytes, void* stream) {
    int result = 0;
    if (fails(name, &result)) return result;
    if (depth == 0) return 201;  // CUDA_ERROR_INVALID_CONTEXT
    if (bytes == 0) return 1;    // CUDA_ERROR_INVALID_VALUE: an empty tensor may lie nowhere
    std::lock_guard<std::mutex> const lock(state().mutex);
    state().copies.push_back({to, from, bytes, stream});
    return 0;
}

API int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, void* stream) {
    return begin_copy("cuMemcpyDtoHAsync_v2", to, reinterpret_cast<void const*>(from), bytes,
                      stream);
}

API int cuMemcpyHtoDAsync_v2(unsigned long long to, void const* from, size_t bytes, void* stream) {
    return begin_copy("cuMemcpyHtoDAsync_v2", reinterpret_cast<void*>(to), from, bytes, stream);
}

API int cuStreamSynchronize(void* stream) {
    int result = 0;
    bool const failed = fails("cuStreamSynchronize", &result);
    std::lock_guard<std::mutex> const lock(state().mutex);
    std::vector<Copy> others;
    for (Copy const& copy : state().copies)
        if (copy.stream != stream)
            others.push_back(copy);
        else if (!failed)
            std::memcpy(copy.to, copy.from, copy.bytes);
    state().copies = others;
    return result * failed;
}

// Pretends by writing what it was told.
API int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address,
                               uint64_t const* dims, uint64_t const* strides, unsigned const* box,
                               unsigned const* steps, int interleave, int swizzle, int promotion,
                               int fill) {
    FORWARD(cuTensorMapEncodeTiled,
            (void*, int, unsigned, void*, uint64_t const*, uint64_t const*, unsigned const*,
             unsigned const*, int, int, int, int),
            map, type, rank, address, dims, strides, box, steps, interleave, swizzle, promotion,
            fill);
    if (state().target != nullptr) return result;
    char* to = static_cast<char*>(map);
    auto const write = [&](void const* from, size_t bytes) {
        memcpy(to, from, bytes);
        to += bytes;
    };
    write(&address, sizeof address);
    write(dims, rank * sizeof *dims);
    write(strides, (rank - 1) * sizeof *strides);
    write(box, rank * sizeof *box);
    write(steps, rank * sizeof *steps);
    for (int const number : {type, int(rank), interleave, swizzle, promotion, fill}) {
        *to++ = char(number);
    }
    return result;
}

API int cuMemsetD8Async(unsigned long long memory, unsigned char value, size_t bytes,
                        void* stream) {
    FORWARD(cuMemsetD8Async, (unsigned long long, unsigned char, size_t, void*), memory, value,
            bytes, stream);
    return result;
}

API int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                       unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                       void* stream, void** params, void** extra) {
    LaunchConfig const config = {grid_x,  grid_y,       grid_z, block_x, block_y,
                                 block_z, shared_bytes, stream, nullptr, 0};
    note_launch(function, config, false, params);
    FORWARD(cuLaunchKernel,
            (void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
             void**, void**),
            function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes, stream,
            params, extra);
    return result;
}

API int cuLaunchKernelEx(LaunchConfig const* config, void* function, void** params, void** extra) {
    auto const& attribute = config->attributes[0];
    bool const dependent =
        config->attribute_count == 1 && attribute.id == 6 && attribute.value == 1;
    note_launch(function, *config, dependent, params);
    FORWARD(cuLaunchKernelEx, (LaunchConfig const*, void*, void**, void**), config, function,
            params, extra);
    return result;
}

// As at the start. `target` is the look-alike to hand on to; null: pretend.
API void sage_test_reset(char const* target) {
    State& s = state();
    s.target = target == nullptr ? nullptr : dlopen(target, RTLD_NOW | RTLD_LOCAL);
    s.major = 8;
    s.minor = 9;
    s.version = 12040;
    s.failing.clear();
    s.calls.clear();
    s.launches.clear();
    s.copies.clear();
}

API void sage_test_capability(int major, int minor) {
    state().major = major;
    state().minor = minor;
}

// What cuDriverGetVersion says from now on.
API void sage_test_version(int version) { state().version = version; }

// Lets a function fail with a CUresult, after some calls that succeed.
API void sage_test_fail(char const* function, int code, int after) {
    std::lock_guard<std::mutex> const lock(state().mutex);
    state().failing = function;
    state().code = code;
    state().after = after;
    state().calls.clear();
}

// How often a function was called since then.
API int sage_test_calls(char const* function) {
    std::lock_guard<std::mutex> const lock(state().mutex);
    return state().calls[function];
}

// What is held: contexts, modules, and this thread's current contexts.
API void sage_test_held(long (*held)[3]) {
    (*held)[0] = state().contexts;
    (*held)[1] = state().modules;
    (*held)[2] = depth;
}

// How many copies were begun that nobody has waited for.
API size_t sage_test_copies() {
    std::lock_guard<std::mutex> const lock(state().mutex);
    return state().copies.size();
}

API size_t sage_test_launches() { return state().launches.size(); }

// One launch: its symbol, {grid, block, shared_bytes, stream, dependent}, and its parameters.
API char const* sage_test_launch(size_t index, uint64_t (*numbers)[5], char const** params,
                                 size_t* bytes) {
    Launch const& launch = state().launches[index];
    (*numbers)[0] = launch.grid;
    (*numbers)[1] = launch.block;
    (*numbers)[2] = launch.shared_bytes;
    (*numbers)[3] = reinterpret_cast<uintptr_t>(launch.stream);
    (*numbers)[4] = launch.dependent;
    *params = launch.params.data();
    *bytes = launch.params.size();
    return launch.symbol.c_str();
}

API void sage_test_forget() { state().launches.clear(); }
