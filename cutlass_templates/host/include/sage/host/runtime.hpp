// What a kernel image and the driver library agree on. An image is a shared library with one Entry
// per kernel, under the kernel's name, and the variable sage_host_image, through which the driver
// hands it the runtime; so an image needs no symbol of the driver when it is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sage::host {

// Changes with everything in this file.
constexpr uint64_t kAbi = 0x5341'4745'0000'0007;

// How an Entry begins, so that other symbols are not taken for one.
constexpr uint64_t kEntryMark = 0x656e'7472'792d'7361;

// Where in the source an operation is, for messages and for telling operations apart.
struct Site {
    char const* file;
    int line;
};

enum class Access : int {
    kLoadGlobal,
    kLoadWritten,
    kStoreGlobal,
    kStoreStreaming,
    kLoadShared,
    kStoreShared
};

// What the 32 lanes of a warp do together. The argument of each is the struct of that name below.
enum class Collective : int {
    kShuffleXor,
    kLoadMatrix,
    kMmaS4,
    kMmaS8,
    kMmaE4m3,
    kMmaE4m3Half,
    kMmaF16,
    kMmaTf32,
    kWgmma,
    kWgmmaFence,
    kWgmmaCommit,
    kWgmmaWait,
};

struct ShuffleXor {
    uint32_t value;  // replaced by that of the lane's partner
    int lane_mask;
};

struct LoadMatrix {
    uint32_t* registers;  // 4
    void const* row;
};

struct Mma {
    void* accumulators;
    uint32_t const* a;  // 4
    uint32_t const* b;  // 2
};

// A warp's quarter of the product of a warpgroup: 16 rows of A, all rows of B, 32 bytes of each.
struct Wgmma {
    bool integers;       // S8 into int32; else E4M3 into float
    bool accumulate;     // else the accumulators' values do not matter
    int columns;         // rows of B: 8 to 256
    void* accumulators;  // columns / 2 words
    uint32_t const* a;   // 4 registers; null: in shared memory
    uint64_t a_descriptor, b_descriptor;
};

struct WgmmaWait {
    int newest;  // groups that may go on
};

// The services of the executor for the thread that calls. None returns after a failed check.
struct Runtime {
    int (*thread_index)();
    int64_t (*block_index)();
    int64_t (*grid_size)();
    char* (*shared_memory)();
    void (*barrier)(Site);
    // Checks an access of 1, 2, 4, 8 or 16 bytes that the caller makes right afterwards.
    void (*access)(Access, void const*, int bytes, Site);
    // Of counters in global memory: what they were before one is added.
    uint32_t (*take_ticket)(uint32_t*, Site);
    uint32_t (*arrive)(uint32_t*, Site);
    void (*await)(uint32_t const*, uint32_t arrivals, Site);
    void (*await_prerequisites)(Site);
    void (*copy_async)(void* shared, void const* global, Site);
    void (*copy_async_commit)();
    void (*copy_async_wait)(int newest);
    void (*collective)(Collective, void* argument, Site);

    void (*mbarrier_init)(void* mbarrier, int arrivals, Site);
    void (*mbarrier_arrive)(void* mbarrier, int bytes, Site);  // which are expected besides
    void (*mbarrier_wait)(void* mbarrier, int parity, Site);
    void (*copy_bulk)(void* shared, void const* global, int bytes, void* mbarrier, Site);
    void (*copy_tensor)(void* shared, void const* map, int const* at, int dims, void* mbarrier,
                        Site);
    void (*fence_async)(Site);
    void (*named_barrier)(int id, int threads, bool waits, Site);
    void (*set_registers)(int registers, Site);
};

// sage_host_image of an image.
struct Image {
    uint64_t abi;
    Runtime const* runtime;  // set by the driver
};

struct Entry {
    uint64_t mark;
    void (*run)(void const* params);
    int threads;
    int64_t shared_bytes;
    size_t params_bytes;
};

}  // namespace sage::host
