// How the blocks of a persistent grid come to their tasks.
//
// Each begins with the task of its own index, and then takes the next one whenever it is ready for
// it, by a counter in global memory: so all blocks end within one task of one another, however
// long tasks take. Which block does a task changes nothing of its result. Tasks are in such an
// order that the long ones come first, and that those at hand at the same time share keys and
// values, which then stay in the L2 cache: heads are done in groups, and in each group the tasks of
// all of its heads that have the most to do come before those that have less. docs/cuda-hopper.md
// has the alternatives.
#pragma once

#include <sage/arch.cuh>
#include <sage/numeric.cuh>
#include <sage/params.cuh>

namespace sage {

// Positions in the order of tasks.
struct HopperDeal {
    static constexpr int kNone = -1;

    // That of this block's first task, of a grid that has no more blocks than tasks.
    SAGE_DEVICE static int first() { return static_cast<int>(arch::block_index()); }

    // Another one, or kNone: then the block is done.
    SAGE_DEVICE static int next(AttendParams const& p) {
        auto const blocks = static_cast<uint32_t>(arch::grid_size());
        if (blocks >= p.tasks) return kNone;
        uint32_t const position = blocks + arch::take_ticket(p.taken);
        return position < p.tasks ? static_cast<int>(position) : kNone;
    }
};

// The task at a position, of one call. Task has, for the parameters of a launch, `of_head`: how
// many tasks a head makes, which are behind one another, the longest first.
template <class Task>
SAGE_DEVICE int task_at(AttendParams const& p, int position) {
    int const of_head = Task::of_head(p), heads = static_cast<int>(p.heads_at_once);
    Split const group(position, heads * of_head);
    int const first = position - group.inner;
    // The last group may have fewer heads.
    int const left = Split(static_cast<int>(p.tasks) - first, of_head).outer;
    Split const task(group.inner, left < heads ? left : heads);
    return first + task.inner * of_head + task.outer;
}

}  // namespace sage
