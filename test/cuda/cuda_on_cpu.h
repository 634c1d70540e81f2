// cuda_on_cpu.h: runs the kernels of an unchanged qlora.cu on a machine without a GPU.
//
// translate.sh makes three textual substitutions, this header supplies what nvcc and the CUDA
// runtime would, and g++ or clang++ compiles the result. It is a test instrument: slow, exact about
// who waits for whom, and hostile. A GPU forgives most mistakes most of the time; here memory
// starts as NaN, copies arrive as late as the rules allow, threads run in any order asked for, and
// whatever a kernel may not do is reported with kernel, block, thread and line.
//
// This file plays the multiprocessor, memory_on_cpu.h the memory. include/ has the headers that
// qlora.cu asks for: cuda_runtime.h with streams, graphs and what tests call, cuda_bf16.h,
// cublas_v2.h, and the arithmetic of device_functions.h.
//
// How a GPU runs a kernel, and how it is played here
//   thread   One fiber: a stack of its own and a place where it stopped. It runs until it must wait
//            for others, then another goes on. Only one runs at a time, so every run is repeatable.
//   warp     32 threads with consecutive numbers. On the GPU they share an instruction stream, and
//            a few instructions exchange registers between its lanes: shuffles, votes, and the
//            matrix instructions, whose operands lie spread over the registers of all lanes. All
//            are one mechanism here: each lane deposits what it brings and waits; the last to
//            arrive computes everybody's result. Between two such meetings the lanes drift freely,
//            which real ones may do too since Volta.
//   block    Up to 1024 threads that share fast memory and meet at __syncthreads().
//   grid     All blocks of a launch, in no promised order; here one after another, in any order.
//   stream   A queue of launches and copies. Work in one stream runs in order; nothing else is
//            promised unless an event says so. LAZY makes the most of that.
//
// What a test chooses, by the variable CUDA_EMULATOR or by emulator_set(), words apart by blanks:
//   schedule=ascending|descending|random|warp   order of threads; warp: one as far as it can
//   blocks=ascending|descending|random   seed=N
//   unordered        ThreadSanitizer: blocks are not ordered among each other
//   lazy             work runs at the next call that waits for it, as late as possible
//   protect          device memory is inaccessible while host code runs
//   memory=1g        bytes the device has            shared=99k  the most a block can be given
//   devices=1        how many there are              sm=80       compute capability times ten
//   fail_call=N      the N-th runtime call from now fails    fail_malloc=N   the N-th cudaMalloc
//   no_cublas        dlopen finds no cuBLAS
//   timeout=S        a kernel that runs longer ends the program
//   abort            stop in the debugger at the first error
//   default          all of the above as at the start
//
// Limits: no timing, occupancy, bank conflicts, caches or weak memory; __launch_bounds__ is not
// enforced; a graph replays its work in the order of recording; one host thread at a time.
#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H
#define CUDA_ON_CPU 1

#include <dlfcn.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#elif __has_feature(thread_sanitizer)
#define EMULATOR_TSAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__SANITIZE_THREAD__)
#define EMULATOR_TSAN 1
#endif
#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define EMULATOR_ASAN 0
#endif
#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char *, int);
void AnnotateIgnoreReadsEnd(const char *, int);
void AnnotateIgnoreWritesBegin(const char *, int);
void AnnotateIgnoreWritesEnd(const char *, int);
}
#define EMULATOR_RELEASE(tag) __tsan_release(tag)
#define EMULATOR_ACQUIRE(tag) __tsan_acquire(tag)
#else
#define EMULATOR_TSAN 0
#define EMULATOR_RELEASE(tag) (void)(tag)
#define EMULATOR_ACQUIRE(tag) (void)(tag)
#endif

// The sanitizers look at kernels. What plays the GPU touches everybody's memory and is left out.
#if defined(__clang__) && __has_attribute(disable_sanitizer_instrumentation)
#define EMULATOR_CODE __attribute__((disable_sanitizer_instrumentation)) \
                      __attribute__((no_sanitize("address", "thread")))
#else
#define EMULATOR_CODE __attribute__((no_sanitize("address", "thread")))
#endif

#include "include/vector_types.h"

namespace emulator {

// =================================================================================================
//  Options, errors
// =================================================================================================

struct Place { const char *file; int line; };       // in the source of the caller
#define EMULATOR_HERE emulator::Place at = {__builtin_FILE(), __builtin_LINE()}

enum { ASCENDING, DESCENDING, RANDOM, ONE_WARP };
struct Options {
    long schedule = ASCENDING, blocks = ASCENDING, seed = 0, unordered = 0, lazy = 0, protect = 0;
    long memory = 1L << 30, shared = 99 << 10, devices = 1, sm = 80;
    long fail_call = 0, fail_malloc = 0, no_cublas = 0, timeout = 0, abort = 0;
};
inline Options options;
inline long failures, calls, mallocs, launches;
inline cudaError_t last_error = cudaSuccess;        // what cudaGetLastError returns
inline cudaError_t fault = cudaSuccess;             // a kernel died: every call fails from now on
inline bool unseen_launch_failure;
inline uint64_t random_state = 1;

EMULATOR_CODE inline unsigned random_below(unsigned n) {        // splitmix64
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return (unsigned)((z ^ (z >> 31)) % n);
}

// ------------------------------------------------------------------------ what runs at the moment

// A launch: everything but the arguments, which `call` holds.
struct Launch {
    const char *name;
    Place at;
    dim3 grid, block;
    size_t shared;
    const void *kernel;
    std::function<void()> call;
};

typedef void (*AnyFunction)();
typedef void (*Meeting)(AnyFunction f, unsigned mask, const void *const *in, void *const *out);
enum State : unsigned char { FRESH, READY, RUNNING, AT_BARRIER, AT_WARP, RETURNED };
struct AsyncCopy { void *to; const void *from; int bytes; long group; };

struct Thread {
    State state;
    struct Fiber *fiber;        // whose stack it runs on, once it has begun
    uint3 index;
    Place at;                   // where it waits, and in which function
    const char *what;
    int predicate;              // what it brings to a barrier
    unsigned mask;              // ... and to a meeting of its warp
    AnyFunction function;
    const void *in;
    void *out;
    unsigned barriers, syncs;   // passed so far
    AsyncCopy *copies;          // cp.async not waited for, oldest first
    int n_copies, room;
    long group;                 // number of the cp.async group being collected
};

enum { MAX_THREADS = 1024 };
struct Block {
    const Launch *launch;       // NULL: host code runs
    int threads, runnable, returned, at_barrier;
    int count;                  // of true predicates at the last barrier
    int current;                // the thread that runs, -1: none
    int n_order, position;      // the current pass over the threads
    int warp;                   // schedule=warp: the one that is run
    unsigned lanes_waiting[MAX_THREADS / 32];   // for their warp
    int order[MAX_THREADS];
    Thread thread[MAX_THREADS];
};
inline Block block = {nullptr, 0, 0, 0, 0, 0, -1, 0, 0, -1, {}, {}, {}};

__attribute__((format(printf, 2, 3)))
EMULATOR_CODE inline void report(Place at, const char *format, ...) {
    va_list args;
    failures++;
    fprintf(stderr, "CUDA emulator: ");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    if (at.file) fprintf(stderr, ", %s:%d", at.file, at.line);
    if (block.launch) {
        fprintf(stderr, "\n    in %s, block (%u, %u, %u)", block.launch->name, blockIdx.x,
                blockIdx.y, blockIdx.z);
        if (block.current >= 0)
            fprintf(stderr, ", thread (%u, %u, %u)", threadIdx.x, threadIdx.y, threadIdx.z);
        fprintf(stderr, ", launched at %s:%d", block.launch->at.file, block.launch->at.line);
    }
    fputc('\n', stderr);
    if (options.abort) ::abort();
}

[[noreturn]] inline void stop_kernel(cudaError_t error);

// Reports what a kernel did wrong and ends the kernel, as a GPU would if it noticed.
#define EMULATOR_FAULT(...) \
    (emulator::report(__VA_ARGS__), emulator::stop_kernel(cudaErrorLaunchFailure))

// =================================================================================================
//  Fibers
//
//  A function call saves the registers that the callee may overwrite; a switch of fibers saves the
//  others, changes the stack pointer, and returns: into the other fiber.
// =================================================================================================

#if !defined(EMULATOR_UCONTEXT) && defined(__linux__) && defined(__x86_64__)
typedef void *Context;          // the stack pointer; everything else lies on the stack
extern "C" void emulator_switch(Context *from, Context to);
asm(R"(
    .pushsection .text
    .weak emulator_switch
    .type emulator_switch, @function
emulator_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
    .size emulator_switch, . - emulator_switch
    .popsection
)");

EMULATOR_CODE inline void make_context(Context *context, char *stack, size_t bytes,
                                       void (*entry)()) {
    void **top = (void **)(stack + bytes);      // 16-byte aligned
    *--top = nullptr;                           // where entry would return to: never
    *--top = (void *)entry;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    *context = top;
}
EMULATOR_CODE inline void switch_context(Context *from, Context *to) { emulator_switch(from, *to); }

#elif !defined(EMULATOR_UCONTEXT) && defined(__linux__) && defined(__aarch64__)
typedef void *Context;
extern "C" void emulator_switch(Context *from, Context to);
asm(R"(
    .pushsection .text
    .weak emulator_switch
    .type emulator_switch, @function
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]; stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
    mov x9, sp; str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]; ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size emulator_switch, . - emulator_switch
    .popsection
)");

EMULATOR_CODE inline void make_context(Context *context, char *stack, size_t bytes,
                                       void (*entry)()) {
    void **top = (void **)(stack + bytes - 160);
    for (int i = 0; i < 20; i++) top[i] = nullptr;
    top[11] = (void *)entry;                    // x30, the link register
    *context = top;
}
EMULATOR_CODE inline void switch_context(Context *from, Context *to) { emulator_switch(from, *to); }

#else
}
#include <ucontext.h>
namespace emulator {
typedef ucontext_t Context;
EMULATOR_CODE inline void make_context(Context *context, char *stack, size_t bytes,
                                       void (*entry)()) {
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = bytes;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
}
EMULATOR_CODE inline void switch_context(Context *from, Context *to) { swapcontext(from, to); }
#endif

#ifdef __x86_64__
constexpr size_t PAGE = 4096;
#else
constexpr size_t PAGE = 65536;          // or a divisor of it
#endif
constexpr size_t STACK = EMULATOR_TSAN ? 64 << 10 : 256 << 10;
struct Fiber {
    Context context;
    char *stack;                // the page below is inaccessible
    size_t stack_bytes;
    void *fake_stack;           // AddressSanitizer's
    void *tsan;                 // ThreadSanitizer's view of this fiber
};
inline Fiber host;              // where run_grid was called
inline std::vector<Fiber *> fibers;             // all that were made
inline Fiber *idle[MAX_THREADS + 1];            // those without a thread
inline int n_idle;
inline std::vector<std::pair<char *, size_t>> stacks;    // their mappings
inline Fiber *came_from;

// Tags are what ThreadSanitizer orders memory by. It keeps neighbours within 64 bytes together. Of
// barriers and warps two in turn: a fast thread releases the next one's before a slow one has
// acquired the last.
struct alignas(64) Tag { char bytes[64]; };
struct Tags { Tag barrier[2], warp[MAX_THREADS / 32][2]; };
inline Tags *tags;              // of the block
inline Tag start_tag, end_tag;

[[noreturn]] inline void fiber_main();

inline void *map_memory(size_t bytes, int access) {
    void *memory = mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return perror("CUDA emulator: mmap"), ::abort(), nullptr;
    return memory;
}

// Makes sure that n fibers are idle. With ThreadSanitizer blocks that are unordered get new ones
// each: a fiber knows what it waited for in its block, and its stack is memory like any other.
inline void make_fibers(int n) {
    int have = (int)fibers.size();
    if (have < n) {
        size_t bytes = (size_t)(n - have) * (STACK + PAGE);
        char *memory = (char *)map_memory(bytes, PROT_READ | PROT_WRITE);
        stacks.push_back({memory, bytes});
        for (int i = have; i < n; i++, memory += STACK + PAGE) {
            if (!EMULATOR_TSAN) mprotect(memory, PAGE, PROT_NONE);
            Fiber *fiber = new Fiber();
            fiber->stack = memory + PAGE;
            fiber->stack_bytes = STACK - (size_t)i * 448 % PAGE;    // in different cache lines
#if EMULATOR_TSAN
            fiber->tsan = __tsan_create_fiber(0);
#endif
            fibers.push_back(fiber);
        }
    }
    n_idle = 0;
    for (Fiber *fiber : fibers) idle[n_idle++] = fiber;
}

inline void end_fibers() {
#if EMULATOR_TSAN
    for (Fiber *fiber : fibers) __tsan_destroy_fiber(fiber->tsan);
#endif
    for (Fiber *fiber : fibers) delete fiber;
    for (auto &mapping : stacks) munmap(mapping.first, mapping.second);
    fibers.clear();
    stacks.clear();
}

// Leaves one fiber for another; returns when somebody comes back. `forever`: nobody will.
EMULATOR_CODE inline void go(Fiber *from, Fiber *to, bool forever) {
    came_from = from;
#if EMULATOR_ASAN
    __sanitizer_start_switch_fiber(forever ? nullptr : &from->fake_stack, to->stack,
                                   to->stack_bytes);
#endif
#if EMULATOR_TSAN
    __tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync);
#endif
    (void)forever;
    switch_context(&from->context, &to->context);
#if EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// =================================================================================================
//  The scheduler: who runs next
// =================================================================================================

EMULATOR_CODE inline bool warp_can_run(int warp) {
    if (warp < 0) return false;
    for (int t = 32 * warp; t < 32 * warp + 32 && t < block.threads; t++)
        if (block.thread[t].state <= READY) return true;
    return false;
}

// The order in which threads get their turn until the next pass.
EMULATOR_CODE inline void new_pass() {
    int first = 0, n = block.threads;
    if (options.schedule == ONE_WARP) {         // the largest distance between warps
        int able[MAX_THREADS / 32], n_able = 0;
        for (int w = 0; 32 * w < block.threads; w++)
            if (warp_can_run(w)) able[n_able++] = w;
        if (n_able && !warp_can_run(block.warp)) block.warp = able[random_below((unsigned)n_able)];
        first = 32 * block.warp;
        n = n_able == 0 ? 0 : block.threads - first < 32 ? block.threads - first : 32;
    }
    for (int i = 0; i < n; i++)
        block.order[i] = options.schedule == DESCENDING ? n - 1 - i : first + i;
    for (int i = n - 1; options.schedule >= RANDOM && i > 0; i--) {
        int j = (int)random_below((unsigned)i + 1), t = block.order[i];
        block.order[i] = block.order[j];
        block.order[j] = t;
    }
    block.n_order = n;
    block.position = 0;
}

// The next thread that can run, or -1.
EMULATOR_CODE inline int pick() {
    while (block.runnable > 0) {
        while (block.position < block.n_order) {
            int t = block.order[block.position++];
            if (block.thread[t].state <= READY) return t;
        }
        new_pass();
    }
    return -1;
}

// From here on thread t is the one that runs. Returns its fiber; a fresh thread takes an idle one.
EMULATOR_CODE inline Fiber *become(int t, Fiber *heir) {
    Thread *thread = &block.thread[t];
    if (thread->state == FRESH) {
        thread->fiber = heir;
        if (!heir) {
            thread->fiber = idle[--n_idle];
            make_context(&thread->fiber->context, thread->fiber->stack, thread->fiber->stack_bytes,
                         fiber_main);
        }
    }
    thread->state = RUNNING;
    block.runnable--;
    block.current = t;
    threadIdx = thread->index;
    return thread->fiber;
}

// Lists the threads that wait, together where they wait for the same.
EMULATOR_CODE inline void say_who_waits_where() {
    for (int t = 0, end; t < block.threads; t = end) {
        const Thread *a = &block.thread[t];
        for (end = t + 1; end < block.threads; end++) {
            const Thread *b = &block.thread[end];
            if (b->state != a->state) break;
            if (a->state != RETURNED && (b->at.line != a->at.line || b->what != a->what)) break;
        }
        fprintf(stderr, "    threads %d-%d ", t, end - 1);
        if (a->state == RETURNED) fprintf(stderr, "have returned\n");
        else if (a->state >= AT_BARRIER)
            fprintf(stderr, "wait in %s, %s:%d\n", a->what, a->at.file, a->at.line);
        else fprintf(stderr, "can run\n");
    }
}

// No thread can go on though some have not returned.
[[noreturn]] EMULATOR_CODE inline void stuck() {
    const Thread *waiting = nullptr;
    bool warp = false, barrier = false;
    for (int t = 0; t < block.threads; t++) {
        const Thread *thread = &block.thread[t];
        if (thread->state == AT_WARP) warp = true;
        if (thread->state == AT_BARRIER) barrier = true;
        if (!waiting && thread->state != RETURNED) waiting = thread;
    }
    const char *kind = warp && barrier ? "deadlock" : warp ? "divergent collective"
                                                           : "divergent barrier";
    report(waiting->at, "%s: no thread of the block can go on", kind);
    say_who_waits_where();
    stop_kernel(cudaErrorLaunchFailure);
}

// The current thread has said what it waits for; returns when it is its turn again.
EMULATOR_CODE inline void wait() {
    int me = block.current, next = pick();
    if (next < 0) stuck();
    Fiber *from = block.thread[me].fiber, *to = become(next, nullptr);
    if (next != me) go(from, to, false);
}

// Where every fiber begins. A thread that returns hands its stack on to one that has not begun,
// without a switch: kernels that never wait run as fast as a loop.
[[noreturn]] EMULATOR_CODE inline void fiber_main() {
#if EMULATOR_ASAN
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (came_from == &host) host.stack = (char *)bottom, host.stack_bytes = bytes;
#endif
    for (;;) {
        EMULATOR_ACQUIRE(&start_tag);
        block.launch->call();
        Thread *me = &block.thread[block.current];
        Fiber *mine = me->fiber;
        me->state = RETURNED;
        block.returned++;
        EMULATOR_RELEASE(&end_tag);
        int next = pick();
        if (next < 0 && block.returned < block.threads) stuck();
        if (next >= 0 && !EMULATOR_TSAN && block.thread[next].state == FRESH) {
            become(next, mine);
            continue;
        }
        if (!EMULATOR_TSAN) idle[n_idle++] = mine;
        if (next < 0) block.current = -1;
        go(mine, next < 0 ? &host : become(next, nullptr), true);
    }
}

// Ends the running kernel: its threads never run again.
[[noreturn]] EMULATOR_CODE inline void stop_kernel(cudaError_t error) {
    fault = error;
#if EMULATOR_TSAN
    fflush(nullptr);
    _exit(66);          // fibers that end in the middle of things confuse ThreadSanitizer
#endif
    Fiber *mine = block.thread[block.current].fiber;
    block.current = -1;
    go(mine, &host, true);
    ::abort();
}

// =================================================================================================
//  Meetings: barriers and warps
// =================================================================================================

// __syncthreads and its relatives. Returns how many threads brought a true predicate.
EMULATOR_CODE inline int barrier(const char *what, int predicate, Place at) {
    if (block.current < 0) return report(at, "%s outside a kernel", what), 0;
    Thread *me = &block.thread[block.current];
    me->at = at, me->what = what, me->predicate = predicate, me->state = AT_BARRIER;
    Tag *tag = &tags->barrier[me->barriers++ & 1];
    EMULATOR_RELEASE(tag);
    if (++block.at_barrier == block.threads) {
        block.count = block.at_barrier = 0;
        for (int t = 0; t < block.threads; t++) {
            Thread *other = &block.thread[t];
            if (other->at.line != at.line || other->what != what) {
                report(at, "divergent barrier: not all threads wait at the same one");
                say_who_waits_where();
                stop_kernel(cudaErrorLaunchFailure);
            }
            block.count += other->predicate != 0;
        }
        for (int t = 0; t < block.threads; t++) block.thread[t].state = READY;
        block.runnable = block.threads;
        block.position = block.n_order;
    }
    wait();
    EMULATOR_ACQUIRE(tag);
    return block.count;
}

// One meeting of the lanes in mask. Each brings *in; the last to arrive computes all *out.
EMULATOR_CODE inline void meet(const char *what, unsigned mask, Meeting meeting, AnyFunction f,
                               const void *in, void *out, Place at) {
    if (block.current < 0) return report(at, "%s outside a kernel", what);
    int lane = block.current & 31;
    Thread *warp = &block.thread[block.current - lane], *me = warp + lane;
    int others = block.threads - (block.current - lane);
    unsigned present = others >= 32 ? 0xFFFFFFFFu : (1u << others) - 1;
    if (!(mask >> lane & 1)) EMULATOR_FAULT(at, "%s: lane outside its own mask %08x", what, mask);
    if (mask & ~present)
        EMULATOR_FAULT(at, "%s: mask %08x has lanes that the block has not", what, mask);
    me->at = at, me->what = what, me->mask = mask, me->function = f;
    me->in = in, me->out = out, me->state = AT_WARP;
    unsigned *waiting = &block.lanes_waiting[block.current / 32];
    *waiting |= 1u << lane;
    if (mask & ~*waiting) return wait();

    const void *inputs[32];     // all are here; for the same thing?
    void *outputs[32];
    for (int l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        const Thread *other = warp + l;
        if (!(other->mask >> lane & 1)) return wait();          // no: it waits for others first
        if (other->mask != mask)
            EMULATOR_FAULT(at, "%s: lanes disagree on the mask, %08x and lane %d's %08x", what,
                           mask, l, other->mask);
        if (other->function != f || other->at.line != at.line)
            EMULATOR_FAULT(at, "divergent collective: lane %d waits in %s, %s:%d, lane %d in %s", l,
                           other->what, other->at.file, other->at.line, lane, what);
        inputs[l] = other->in, outputs[l] = other->out;
    }
    *waiting &= ~mask;
#if EMULATOR_TSAN
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
    meeting(f, mask, inputs, outputs);
#if EMULATOR_TSAN
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) warp[l].state = READY;
    block.runnable += __builtin_popcount(mask);
    if (options.schedule >= RANDOM) return wait();
    block.runnable--;
    me->state = RUNNING;        // goes on at once
}

template <class In, class Out> using LaneFunction =
    void (*)(unsigned mask, const In *const *in, Out *const *out);

template <class In, class Out>
EMULATOR_CODE void call_lanes(AnyFunction f, unsigned mask, const void *const *in,
                              void *const *out) {
    ((LaneFunction<In, Out>)f)(mask, (const In *const *)in, (Out *const *)out);
}

} // namespace emulator

// The general form, for wrappers of instructions that this header does not have. f gets, for each
// lane l of the mask, what it brought, *in[l], and where its result goes, *out[l].
template <class Out, class In>
EMULATOR_CODE Out emulate_warp(const char *what, unsigned mask, const In &in,
                               emulator::LaneFunction<In, Out> f, EMULATOR_HERE) {
    Out out = {};
    emulator::meet(what, mask, emulator::call_lanes<In, Out>, (emulator::AnyFunction)f, &in, &out,
                   at);
    return out;
}

inline void __syncthreads(EMULATOR_HERE) { emulator::barrier("__syncthreads", 0, at); }
inline int __syncthreads_count(int p, EMULATOR_HERE) {
    return emulator::barrier("__syncthreads_count", p, at);
}
inline int __syncthreads_or(int p, EMULATOR_HERE) {
    return emulator::barrier("__syncthreads_or", p, at) > 0;
}
inline int __syncthreads_and(int p, EMULATOR_HERE) {
    return emulator::barrier("__syncthreads_and", p, at) == emulator::block.threads;
}

// A device gives no order between blocks by fences alone, and qlora.cu asks for none.
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap(EMULATOR_HERE) { EMULATOR_FAULT(at, "trap"); }

namespace emulator {

template <class T> struct Shuffle { T value; int source; };     // source: the lane to read

template <class T>
EMULATOR_CODE void shuffle_lanes(unsigned mask, const Shuffle<T> *const *in, T *const *out) {
    for (int l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        int source = in[l]->source;
        if (!(mask >> source & 1))
            EMULATOR_FAULT(block.thread[block.current].at,
                           "shuffle: lane %d reads lane %d, which mask %08x leaves out", l, source,
                           mask);
        *out[l] = in[source]->value;
    }
}

EMULATOR_CODE inline void vote_lanes(unsigned mask, const int *const *in, unsigned *const *out) {
    unsigned votes = 0;
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1 && *in[l]) votes |= 1u << l;
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) *out[l] = votes;
}

// The rules of PTX's shfl.sync: the source is counted within segments of `width` lanes; one that
// would lie outside gives the lane its own value.
template <class T>
EMULATOR_CODE T shuffle(const char *what, unsigned mask, T value, int lane, int source, int width,
                        bool inside, Place at) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                  "shuffles take 4- and 8-byte numbers");
    if (width < 1 || width > 32 || (width & (width - 1)))
        EMULATOR_FAULT(at, "%s: width %d is not a power of two up to 32", what, width);
    Shuffle<T> in = {value, inside ? source & 31 : lane};
    return emulate_warp<T, Shuffle<T>>(what, mask, in, shuffle_lanes<T>, at);
}
EMULATOR_CODE inline int lane() { return block.current & 31; }

} // namespace emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_HERE) {
    int lane = emulator::lane(), first = lane & ~(width - 1);
    return emulator::shuffle("__shfl_sync", mask, value, lane, first | (source & (width - 1)),
                             width, true, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_HERE) {
    int lane = emulator::lane(), source = lane - (int)delta;
    return emulator::shuffle("__shfl_up_sync", mask, value, lane, source, width,
                             source >= (lane & ~(width - 1)), at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_HERE) {
    int lane = emulator::lane(), source = lane + (int)delta;
    return emulator::shuffle("__shfl_down_sync", mask, value, lane, source, width,
                             source <= (lane | (width - 1)), at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_HERE) {
    int lane = emulator::lane(), source = lane ^ lane_mask;
    return emulator::shuffle("__shfl_xor_sync", mask, value, lane, source, width,
                             source <= (lane | (width - 1)), at);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_HERE) {
    return emulate_warp<unsigned, int>("__ballot_sync", mask, predicate, emulator::vote_lanes, at);
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_HERE) {
    return emulate_warp<unsigned, int>("__any_sync", mask, predicate, emulator::vote_lanes, at) > 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_HERE) {
    return emulate_warp<unsigned, int>("__all_sync", mask, predicate, emulator::vote_lanes, at) ==
           mask;
}

// The only one of them that orders memory between the lanes.
EMULATOR_CODE inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, EMULATOR_HERE) {
    using namespace emulator;
    if (block.current < 0) return report(at, "__syncwarp outside a kernel");
    Tag *tag = &tags->warp[block.current / 32][block.thread[block.current].syncs++ & 1];
    EMULATOR_RELEASE(tag);
    emulate_warp<unsigned, int>("__syncwarp", mask, 0, vote_lanes, at);
    EMULATOR_ACQUIRE(tag);
}

#include "memory_on_cpu.h"

// =================================================================================================
//  The instructions behind the PTX wrappers of qlora.cu
// =================================================================================================

namespace emulator {

struct Row { uint32_t word[4]; };       // 16 bytes: 8 bf16 of one row of a matrix

// Not EMULATOR_CODE: these are the kernel's own accesses, and sanitizers should see them.
__attribute__((noinline)) inline void copy_words(uint32_t *to, const uint32_t *from, int n) {
    for (int i = 0; i < n; i++) to[i] = from[i];
}
__attribute__((noinline)) inline void poison_words(uint32_t *to, int n) {
    for (int i = 0; i < n; i++) to[i] = 0xFFFFFFFFu;
}
__attribute__((noinline)) inline void copy_bytes(char *to, const char *from, int n, int total) {
    for (int i = 0; i < total; i++) to[i] = i < n ? from[i] : 0;
}

// ldmatrix: N 8x8 matrices of 16-bit elements. Lane 8i + r brings row r of matrix i. Lane l gets,
// in word i, the two neighbours in row l/4, columns 2(l%4) and 2(l%4)+1, of matrix i, or of its
// transpose.
template <int N, bool TRANSPOSED>
EMULATOR_CODE void ldmatrix_lanes(unsigned, const Row *const *in, Row *const *out) {
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < N; i++) {
            int row = l / 4, column = 2 * (l % 4);
            if (!TRANSPOSED) out[l]->word[i] = in[8 * i + row]->word[column / 2];
            else {
                uint32_t low = in[8 * i + column]->word[row / 2] >> 16 * (row % 2) & 0xFFFF;
                uint32_t high = in[8 * i + column + 1]->word[row / 2] >> 16 * (row % 2) & 0xFFFF;
                out[l]->word[i] = low | high << 16;
            }
        }
}

template <int N, bool TRANSPOSED>
EMULATOR_CODE void ldmatrix(const char *what, uint32_t *r, const void *row, Place at) {
    Row mine = {};
    if (lane() < 8 * N) {       // the addresses of the other lanes do not matter
        if ((uintptr_t)row % 16) EMULATOR_FAULT(at, "%s: row %p is not 16-byte aligned", what, row);
        if (!in_shared(row, 16)) EMULATOR_FAULT(at, "%s: out of bounds, row %p is not in a shared "
                                                "array", what, row);
        copy_words(mine.word, (const uint32_t *)row, 4);
    }
    Row result = emulate_warp<Row, Row>(what, 0xFFFFFFFFu, mine, ldmatrix_lanes<N, TRANSPOSED>, at);
    for (int i = 0; i < N; i++) r[i] = result.word[i];
}

inline float bf16_to_float(uint32_t bits) {
    bits <<= 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// mma.m16n8k16: D (16, 8) = A (16, 16) B (16, 8) + C, bf16 operands, float sums. In every register
// g = lane / 4 counts rows of A, C and D and columns of B; t = lane % 4 counts pairs along the
// other side. A: words (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8). B: words (2t, g), (2t+8, g).
// C, D: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
struct MmaIn { float c[4]; uint32_t a[4], b[2]; };
struct MmaOut { float d[4]; };

EMULATOR_CODE inline void mma_lanes(unsigned, const MmaIn *const *in, MmaOut *const *out) {
    double A[16][16], B[16][8];
    for (int l = 0; l < 32; l++) {
        int g = l / 4, t = l % 4;
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 4; i++)
                A[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] =
                    bf16_to_float(in[l]->a[i] >> 16 * half & 0xFFFF);
            for (int i = 0; i < 2; i++)
                B[2 * t + 8 * i + half][g] = bf16_to_float(in[l]->b[i] >> 16 * half & 0xFFFF);
        }
    }
    for (int row = 0; row < 16; row++) {
        double sum[8] = {};     // products are exact in double, and their sum nearly
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) sum[column] += A[row][k] * B[k][column];
        for (int column = 0; column < 8; column++) {
            int l = row % 8 * 4 + column / 2, i = row / 8 * 2 + column % 2;
            out[l]->d[i] = (float)(sum[column] + in[l]->c[i]);
        }
    }
}

// Finishes all groups but the newest `pending` ones of this thread.
EMULATOR_CODE inline void finish_copies(int pending) {
    Thread *me = &block.thread[block.current];
    int done = 0;
    while (done < me->n_copies && me->copies[done].group < me->group - pending) {
        AsyncCopy *c = &me->copies[done++];
        copy_bytes((char *)c->to, (const char *)c->from, c->bytes, 16);
    }
    me->n_copies -= done;
    for (int i = 0; i < me->n_copies; i++) me->copies[i] = me->copies[done + i];
}

} // namespace emulator

inline void emulated_ldmatrix_x4(uint32_t r[4], const void *row, EMULATOR_HERE) {
    emulator::ldmatrix<4, false>("ldmatrix_x4", r, row, at);
}
inline void emulated_ldmatrix_x4_trans(uint32_t r[4], const void *row, EMULATOR_HERE) {
    emulator::ldmatrix<4, true>("ldmatrix_x4_trans", r, row, at);
}
inline void emulated_ldmatrix_x2(uint32_t r[2], const void *row, EMULATOR_HERE) {
    emulator::ldmatrix<2, false>("ldmatrix_x2", r, row, at);
}
inline void emulated_ldmatrix_x2_trans(uint32_t r[2], const void *row, EMULATOR_HERE) {
    emulator::ldmatrix<2, true>("ldmatrix_x2_trans", r, row, at);
}

inline void emulated_mma_m16n8k16_bf16(float d[4], const uint32_t a[4], const uint32_t b[2],
                                       const float c[4], EMULATOR_HERE) {
    emulator::MmaIn in = {{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    emulator::MmaOut out =
        emulate_warp<emulator::MmaOut, emulator::MmaIn>("mma_m16n8k16_bf16", 0xFFFFFFFFu, in,
                                                        emulator::mma_lanes, at);
    for (int i = 0; i < 4; i++) d[i] = out.d[i];
}

// cp.async: 16 bytes from global to shared memory, of which src_bytes are read and the others zero.
// Until the thread waits for it the destination is NaN, so a missing wait shows.
EMULATOR_CODE inline void emulated_cp_async16(void *shared, const void *global, int src_bytes = 16,
                                              EMULATOR_HERE) {
    using namespace emulator;
    if (((uintptr_t)shared | (uintptr_t)global) % 16)
        EMULATOR_FAULT(at, "cp_async16: %p or %p is not 16-byte aligned", shared, global);
    if (!in_shared(shared, 16))
        EMULATOR_FAULT(at, "cp_async16: out of bounds, %p is not in a shared array", shared);
    if (src_bytes < 0 || src_bytes > 16 ||
        (src_bytes && !find(buffers, global, (size_t)src_bytes)))
        EMULATOR_FAULT(at, "cp_async16: out of bounds, %d bytes at %p are not in a device buffer",
                       src_bytes, global);
    Thread *me = &block.thread[block.current];
    if (me->n_copies == me->room) {
        me->room = 2 * me->room + 16;
        me->copies = (AsyncCopy *)realloc(me->copies, (size_t)me->room * sizeof(AsyncCopy));
    }
    poison_words((uint32_t *)shared, 4);
    me->copies[me->n_copies++] = {shared, global, src_bytes, me->group};
}
EMULATOR_CODE inline void emulated_cp_async_commit() {
    emulator::block.thread[emulator::block.current].group++;
}
EMULATOR_CODE inline void emulated_cp_async_wait(int pending) { emulator::finish_copies(pending); }

// =================================================================================================
//  Running a grid
// =================================================================================================

namespace emulator {

EMULATOR_CODE inline void run_block() {
    if (!shared_memory_base) {
        size_t bytes = SHARED_SPAN + sizeof(Tags);
        shared_memory_base = (char *)map_memory(bytes, PROT_READ | PROT_WRITE);
        tags = (Tags *)(shared_memory_base + SHARED_SPAN);
        shared_used = SHARED_SPAN - BORDER;     // not 0xFF yet
    }
    begin_shared();
    make_fibers(block.threads);
    block.runnable = block.threads;
    block.returned = block.at_barrier = 0;
    block.warp = -1;
    for (unsigned &lanes : block.lanes_waiting) lanes = 0;
    for (int t = 0; t < block.threads; t++) {
        Thread *thread = &block.thread[t];
        thread->state = FRESH;
        thread->barriers = thread->syncs = 0;
        thread->n_copies = 0, thread->group = 0;
    }
    new_pass();
    EMULATOR_RELEASE(&start_tag);
    go(&host, become(pick(), nullptr), false);
    if (fault == cudaSuccess) end_shared();
    else for (Fiber *fiber : fibers) allow(fiber->stack, STACK);    // some will never return
    if (EMULATOR_TSAN && options.unordered) {   // the next block shares no memory with this one
        end_fibers();
        munmap(shared_memory_base, SHARED_SPAN + sizeof(Tags));
        shared_memory_base = nullptr;
    }
}

// All blocks of a launch, one after another.
EMULATOR_CODE inline void run_grid(const Launch &launch) {
    DeviceWork work;
    size_t n = (size_t)launch.grid.x * launch.grid.y * launch.grid.z;
    std::vector<size_t> order(n);
    for (size_t i = 0; i < n; i++) order[i] = options.blocks == DESCENDING ? n - 1 - i : i;
    for (size_t i = n; options.blocks == RANDOM && i-- > 1;)
        std::swap(order[i], order[random_below((unsigned)i + 1)]);

    block.launch = &launch;
    block.threads = (int)(launch.block.x * launch.block.y * launch.block.z);
    blockDim = launch.block, gridDim = launch.grid;
    for (unsigned t = 0; t < (unsigned)block.threads; t++)
        block.thread[t].index = {t % launch.block.x, t / launch.block.x % launch.block.y,
                                 t / launch.block.x / launch.block.y};
#if EMULATOR_TSAN
    host.tsan = __tsan_get_current_fiber();
    static bool told = false;
    if (block.threads > 128 && !told)
        told = fprintf(stderr, "CUDA emulator: ThreadSanitizer misses races in kernels of more "
                       "than 128 threads, as in %s\n", launch.name) > 0;
#endif
    if (options.timeout) alarm((unsigned)options.timeout);
    for (size_t i = 0; i < n && fault == cudaSuccess; i++) {
        size_t b = order[i];
        blockIdx = {(unsigned)(b % launch.grid.x), (unsigned)(b / launch.grid.x % launch.grid.y),
                    (unsigned)(b / launch.grid.x / launch.grid.y)};
        run_block();
        if (!options.unordered) EMULATOR_ACQUIRE(&end_tag);
    }
    EMULATOR_ACQUIRE(&end_tag);
    if (options.timeout) alarm(0);
    for (const Buffer &b : buffers) check_border(b);
    block.launch = nullptr;
    launches++;
}

} // namespace emulator

#include "include/cuda_runtime.h"
#endif // CUDA_ON_CPU_H
