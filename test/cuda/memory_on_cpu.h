// memory_on_cpu.h: the memory of the emulated GPU, device and shared. Part of cuda_on_cpu.h.
#pragma once

// =================================================================================================
//  Memory
//
//  Each device buffer has pages of its own and ends, rounded up to 256 bytes as on the device,
//  where an inaccessible page begins; addresses are never used twice. So far misses fault at once,
//  near ones are seen by AddressSanitizer, and near writes by a look at the border after each
//  kernel. Whatever has not been written is 0xFF: NaN in every float type, -1 in every integer.
// =================================================================================================

namespace emulator {

constexpr int UNWRITTEN = 0xFF;
struct Buffer {
    char *data, *pages;         // the data end at the end of the pages
    size_t bytes, span;         // of data, of pages
    long number;                // counted from the start of the program
    Place at;                   // where it was allocated
};
inline std::vector<Buffer> buffers;             // in device memory, alive
inline std::vector<Buffer> pinned;              // host memory that the device may access
inline char *device_memory, *device_end, *device_next;
inline size_t device_used;
inline int device_work;         // > 0 while the device may touch its memory

inline void forbid(const char *p, size_t bytes) {
#if EMULATOR_ASAN
    __asan_poison_memory_region(p, bytes);
#endif
    (void)p, (void)bytes;
}
inline void allow(const char *p, size_t bytes) {
#if EMULATOR_ASAN
    __asan_unpoison_memory_region(p, bytes);
#endif
    (void)p, (void)bytes;
}
EMULATOR_CODE inline bool is_unwritten(const char *p, const char *end) {
    while (p < end)
        if ((unsigned char)*p++ != UNWRITTEN) return false;
    return true;
}
inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// The buffer that holds bytes p .. p+n-1, or NULL. One past the end counts when n is 0.
inline const Buffer *find(const std::vector<Buffer> &list, const void *p, size_t n) {
    for (const Buffer &b : list)
        if ((char *)p >= b.data && (char *)p <= b.data + b.bytes &&
            n <= (size_t)(b.data + b.bytes - (char *)p)) return &b;
    return nullptr;
}
inline bool on_device(const void *p) {
    return device_memory && (char *)p >= device_memory && (char *)p < device_end;
}

// While one of these lives, PROTECT lets device memory be touched.
inline void protect_buffers(bool accessible) {
    for (const Buffer &b : buffers)
        mprotect(b.pages, b.span, accessible ? PROT_READ | PROT_WRITE : PROT_NONE);
}
struct DeviceWork {
    DeviceWork() { if (device_work++ == 0 && options.protect) protect_buffers(true); }
    ~DeviceWork() { if (--device_work == 0 && options.protect) protect_buffers(false); }
};

inline void *allocate(size_t bytes, Place at) {
    if (!device_memory) {
        size_t reserve = (size_t)16 << 30;
        device_memory = device_next = (char *)map_memory(reserve, PROT_NONE);
        device_end = device_memory + reserve;
    }
    size_t rounded = round_up(bytes, 256), span = round_up(rounded, PAGE);
    if (rounded > (size_t)options.memory - device_used) return nullptr;
    if (buffers.empty() && device_next + span + 2 * PAGE > device_end) device_next = device_memory;
    if (device_next + span + 2 * PAGE > device_end) return nullptr;
    DeviceWork work;
    Buffer b = {nullptr, device_next + PAGE, bytes, span, ++mallocs, at};
    b.data = b.pages + span - rounded;
    device_next = b.pages + span;
    device_used += rounded;
    mprotect(b.pages, span, PROT_READ | PROT_WRITE);
#ifdef MADV_HUGEPAGE
    madvise(b.pages, span, MADV_HUGEPAGE);
#endif
    allow(b.pages, span);
    memset(b.pages, UNWRITTEN, span);
    forbid(b.pages, (size_t)(b.data - b.pages));
    forbid(b.data + bytes, rounded - bytes);
    buffers.push_back(b);
    return b.data;
}

EMULATOR_CODE inline void check_border(const Buffer &b) {
    if (EMULATOR_ASAN) return;
    if (!is_unwritten(b.pages, b.data) || !is_unwritten(b.data + b.bytes, b.pages + b.span))
        report(b.at, "out of bounds: somebody wrote just outside device buffer %ld (%zu bytes, "
               "allocated here)", b.number, b.bytes);
}

inline void release(size_t i) {
    DeviceWork work;
    Buffer b = buffers[i];
    check_border(b);
    buffers.erase(buffers.begin() + (long)i);
    device_used -= round_up(b.bytes, 256);
    allow(b.pages, b.span);
    madvise(b.pages, b.span, MADV_DONTNEED);
    mprotect(b.pages, b.span, PROT_NONE);
}

// ---------------------------------------------------------------- accesses that the hardware stops

inline struct sigaction old_handlers[2];

// SIGSEGV and SIGBUS: names the culprit. A kernel ends; host code that touched device memory under
// PROTECT is allowed to, so that the test goes on; everything else is left to whoever was before.
inline void memory_fault(int signal, siginfo_t *info, void *) {
    char *p = (char *)info->si_addr;
    bool in_kernel = block.current >= 0;
    Place nowhere = {nullptr, 0};
    for (const Buffer &b : buffers)
        if (p >= b.pages && p < b.pages + b.span && !in_kernel) {
            report(b.at, "host code touches device memory: byte %ld of buffer %ld, allocated",
                   (long)(p - b.data), b.number);
            mprotect(b.pages, b.span, PROT_READ | PROT_WRITE);
            return;
        }
    if (!in_kernel && !on_device(p)) {
        sigaction(signal, &old_handlers[signal == SIGBUS], nullptr);
        return;
    }
    const Buffer *near = nullptr;
    for (const Buffer &b : buffers)
        if (p >= b.pages - PAGE && p < b.pages + b.span + (64 << 10)) near = &b;
    const char *stack = in_kernel ? block.thread[block.current].fiber->stack : nullptr;
    if (stack && p >= stack - PAGE && p < stack)
        report(nowhere, "stack overflow");
    else if (near)
        report(near->at, "out of bounds: byte %ld of device buffer %ld, which has %zu, allocated",
               (long)(p - near->data), near->number, near->bytes);
    else
        report(nowhere, on_device(p) ? "out of bounds: %p in device memory belongs to no buffer, "
               "or to one that was freed" : "illegal address %p", (void *)p);
    if (!in_kernel || EMULATOR_ASAN) fflush(nullptr), _exit(66);
    stop_kernel(cudaErrorIllegalAddress);
}

inline void timed_out(int) {
    report({nullptr, 0}, "the kernel has been running for %ld seconds", options.timeout);
    _exit(66);
}

inline void catch_signals() {
    stack_t stack = {};         // one of its own, for the fault may be an overflow of the other
    stack.ss_size = 256 << 10;
    stack.ss_sp = map_memory(stack.ss_size, PROT_READ | PROT_WRITE);
    sigaltstack(&stack, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = memory_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_handlers[0]);
    sigaction(SIGBUS, &action, &old_handlers[1]);
    if (!EMULATOR_TSAN) signal(SIGALRM, timed_out);     // which would hold the handler back
}

// ----------------------------------------------------------------------------------- shared memory

// Lies in one arena with borders around every array, for a block at a time. An array has the
// alignment it asks for and no more: what a GPU happens to do better does not help here.
struct SharedArray { const char *name; int line; char *data; size_t bytes; };
enum { MAX_SHARED_ARRAYS = 64 };
constexpr size_t BORDER = 128, SHARED_SPAN = 320 << 10, SHARED_WITHOUT_ASKING = 48 << 10;
inline char *shared_memory_base;
inline SharedArray shared_arrays[MAX_SHARED_ARRAYS];
inline int n_shared_arrays;
inline size_t shared_used, shared_count;        // bytes of the arena; bytes the kernel asked for
inline bool dynamic_is_loose;                   // it was declared without __align__(16)

EMULATOR_CODE inline void *shared_array(const char *name, size_t bytes, size_t align, Place at) {
    if (block.current < 0 && bytes) return report(at, "shared memory outside a kernel"), nullptr;
    for (int i = 0; i < n_shared_arrays; i++)
        if (shared_arrays[i].line == at.line && !strcmp(shared_arrays[i].name, name))
            return shared_arrays[i].data;
    shared_count = round_up(shared_count, align) + bytes;
    size_t most = block.launch->shared > SHARED_WITHOUT_ASKING ? (size_t)options.shared
                                                               : SHARED_WITHOUT_ASKING;
    if (shared_count > most || n_shared_arrays == MAX_SHARED_ARRAYS)
        EMULATOR_FAULT(at, "too much shared memory: %zu bytes of at most %zu", shared_count, most);
    if (align < 8) align = 8;   // AddressSanitizer's borders need it
    size_t start = round_up(shared_used + BORDER, 2 * align > 128 ? 2 * align : 128) + align;
    char *data = shared_memory_base + start;
    shared_used = start + bytes;
    allow(data, bytes);
    shared_arrays[n_shared_arrays++] = {name, at.line, data, bytes};
    return data;
}

// A block begins: no arrays, no values. Also tells what was written between the last block's.
EMULATOR_CODE inline void begin_shared() {
    allow(shared_memory_base, SHARED_SPAN);
    memset(shared_memory_base, UNWRITTEN, round_up(shared_used + BORDER, 128));
    forbid(shared_memory_base, SHARED_SPAN);
    n_shared_arrays = 0;
    shared_used = shared_count = 0;
    dynamic_is_loose = false;
    if (block.launch->shared) {
        block.current = 0;
        shared_array("dynamic", block.launch->shared, 16, {"", 0});
        block.current = -1;
    }
}

EMULATOR_CODE inline void end_shared() {
    if (dynamic_is_loose && (shared_count - block.launch->shared) % 16)
        report(block.launch->at, "dynamic shared memory behind static arrays needs __align__(16)");
    if (EMULATOR_ASAN) return;
    char *border = shared_memory_base;
    for (int i = 0; i <= n_shared_arrays; i++) {
        char *end = i < n_shared_arrays ? shared_arrays[i].data
                                        : shared_memory_base + shared_used + BORDER;
        if (!is_unwritten(border, end))
            report(block.launch->at, "out of bounds: the kernel wrote just outside shared array %s",
                   shared_arrays[i < n_shared_arrays ? i : i - 1].name);
        if (i < n_shared_arrays) border = end + shared_arrays[i].bytes;
    }
}

EMULATOR_CODE inline bool in_shared(const void *p, size_t n) {
    for (int i = 0; i < n_shared_arrays; i++)
        if ((char *)p >= shared_arrays[i].data &&
            (char *)p + n <= shared_arrays[i].data + shared_arrays[i].bytes) return true;
    return false;
}

} // namespace emulator

// What translate.sh makes of `__shared__ T x[..];` and `extern __shared__ T x[];`.
template <class T, size_t ALIGN = alignof(T)>
T &emulated_shared(const char *name, EMULATOR_HERE) {
    return *(T *)emulator::shared_array(name, sizeof(T), ALIGN, at);
}
template <class T, size_t ALIGN = alignof(T)>
EMULATOR_CODE T *emulated_dynamic_shared(EMULATOR_HERE) {
    static_assert(ALIGN <= 16, "dynamic shared memory begins at a multiple of 16 bytes, no more");
    if (!emulator::block.launch->shared)
        EMULATOR_FAULT(at, "out of bounds: launched without dynamic shared memory");
    if (ALIGN < 16) emulator::dynamic_is_loose = true;
    return (T *)emulator::shared_arrays[0].data;
}
