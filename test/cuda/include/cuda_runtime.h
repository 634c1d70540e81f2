// cuda_runtime.h: the host's side of CUDA as qlora.cu uses it: memory, launches, streams, events,
// graphs. Each call is counted, so that "the n-th one fails" is one number, and checks what the
// real one leaves to luck: pointers of the wrong side, sizes, directions, handles long destroyed.
#pragma once
#include "../cuda_on_cpu.h"
#include "device_functions.h"

// =================================================================================================
//  Streams
//
//  A stream is a queue. Without LAZY work is done when it is submitted. With LAZY it waits until
//  somebody asks for its end, and then only what must come before is done. An op holds a copy of
//  all that its launch or copy was given, so that a graph can do it again.
// =================================================================================================

struct CUgraph_st { std::vector<struct EmulatedOp> ops; };
struct CUgraphExec_st { std::vector<struct EmulatedOp> ops; };
struct CUevent_st {
    CUstream_st *stream;        // recorded there, after `count` of its ops; NULL: never
    size_t count;
    bool captured, timing;      // recorded into a graph; has a clock
    double time;                // in ms, when it was reached
};

struct EmulatedOp {
    std::function<void()> run;
    std::vector<std::pair<CUstream_st *, size_t>> after;    // so many ops of that stream come first
};

struct CUstream_st {
    bool blocking;              // ordered with the legacy stream, 0
    bool alive;
    std::deque<EmulatedOp> queue;
    size_t issued, done;        // ops, from the beginning
    struct EmulatedCapture *capture;
    size_t recorded, joined;    // ops captured here; how many of them the origin waits for
};

struct EmulatedCapture {
    CUgraph_st *graph;
    CUstream_st *origin;
    bool relaxed, broken;
};

enum cudaMemcpyKind {
    cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed
};
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };
enum { cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };

namespace emulator {

// Everything with a handle, and where it was made: what is left at the end is a leak.
struct Handle { const char *kind; Place at; };
inline std::map<const void *, Handle> handles;
inline CUstream_st legacy_stream = {true, true, {}, 0, 0, nullptr, 0, 0};
inline std::vector<CUstream_st *> streams = {&legacy_stream};
inline std::vector<EmulatedCapture *> captures;
inline std::map<const void *, int> shared_allowed;      // by cudaFuncSetAttribute

inline cudaError_t fail(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

inline void say_at_exit();

// Every runtime call passes here. Counts it; says whether it is the one that was asked to fail.
inline bool asked_to_fail() {
    static bool first = true;
    if (first) atexit(say_at_exit), catch_signals();
    first = false;
    calls++;
    return options.fail_call > 0 && --options.fail_call == 0;
}

#define EMULATED_CALL(error) do { \
        if (emulator::asked_to_fail()) return emulator::fail(error); \
        if (emulator::fault != cudaSuccess) return emulator::fault; \
    } while (0)
// Calls that a stream capture forbids: they break it.
#define EMULATED_CALL_NOT_CAPTURED(error) do { \
        EMULATED_CALL(error); \
        if (emulator::breaks_capture()) return emulator::fail(cudaErrorStreamCaptureUnsupported); \
    } while (0)

inline bool breaks_capture() {
    bool strict = false;
    for (EmulatedCapture *c : captures)
        if (!c->relaxed) strict = c->broken = true;
    return strict;
}

// What is wrong with a handle, if anything.
inline cudaError_t check_handle(const void *handle, const char *kind, Place at) {
    auto i = handles.find(handle);
    if (i != handles.end() && !strcmp(i->second.kind, kind)) return cudaSuccess;
    report(at, "invalid handle: this is no %s, or no longer", kind);
    return fail(cudaErrorInvalidResourceHandle);
}
inline CUstream_st *stream_of(cudaStream_t s) { return s ? s : &legacy_stream; }
inline cudaError_t check_stream(cudaStream_t s, Place at) {
    return s ? check_handle(s, "stream", at) : cudaSuccess;
}

// Does the ops of a stream until `count` are done, and before each what it must come after.
inline void run_until(CUstream_st *s, size_t count) {
    if (s->done >= count) return;
    DeviceWork work;            // once for all ops
    while (s->done < count && !s->queue.empty()) {
        EmulatedOp op = std::move(s->queue.front());
        s->queue.pop_front();
        for (auto &before : op.after) run_until(before.first, before.second);
        if (fault == cudaSuccess) op.run();
        s->done++;
    }
}
inline void run_all() {         // latest stream first: nothing promises the order of issue
    for (size_t i = streams.size(); i-- > 0;) run_until(streams[i], streams[i]->issued);
}

inline cudaError_t submit(cudaStream_t stream, std::function<void()> run,
                          std::vector<std::pair<CUstream_st *, size_t>> after = {}) {
    CUstream_st *s = stream_of(stream);
    if (s->capture) {
        s->capture->graph->ops.push_back({std::move(run), {}});
        s->recorded++;
        return cudaSuccess;
    }
    if (!stream && breaks_capture()) return fail(cudaErrorStreamCaptureImplicit);
    if (!stream) {              // the legacy stream waits for the others, and they for it
        for (CUstream_st *other : streams)
            if (other != s && other->blocking) after.push_back({other, other->issued});
    } else if (s->blocking) after.push_back({&legacy_stream, legacy_stream.issued});
    s->queue.push_back({std::move(run), std::move(after)});
    s->issued++;
    if (!options.lazy) run_until(s, s->issued);
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------- launches

// A pointer given to a kernel must point to device memory or to pinned host memory.
inline void check_pointer(const void *p, const char *kernel, int argument, Place at) {
    if (p && !find(buffers, p, 0) && !find(pinned, p, 0))
        report(at, "host pointer given to a kernel: argument %d of %s, %p%s", argument, kernel, p,
               on_device(p) ? ", which was device memory once" : "");
}
// In a struct whatever looks like the address of readable host memory is taken for one. Where the
// compiler cannot clear padding, not words that begin with a small number: an int and what follows.
#if defined(__has_builtin)
#if __has_builtin(__builtin_clear_padding)
#define EMULATOR_CLEAR_PADDING(p) __builtin_clear_padding(p)
#endif
#endif
inline void check_words(const char *bytes, size_t n, const char *kernel, int argument, Place at) {
    static int pipes[2], failed = pipe(pipes);
    for (; n >= 8; bytes += 8, n -= 8) {
        uintptr_t word;
        char byte;
        memcpy(&word, bytes, 8);
        if (word < (uintptr_t)1 << 44 || word >> 47) continue;
#ifndef EMULATOR_CLEAR_PADDING
        if ((uint32_t)word < 1 << 24) continue;
#endif
        bool readable = on_device((void *)word);
        if (!failed && !readable)       // the system knows; no sanitizer watches a plain syscall
            readable = syscall(SYS_write, pipes[1], word, 1) == 1 && read(pipes[0], &byte, 1) == 1;
        if (readable) check_pointer((void *)word, kernel, argument, at);
    }
}
template <class T> void check_argument(const T &value, const char *kernel, int n, Place at) {
    static_assert(std::is_trivially_copyable<T>::value, "kernels take plain data");
    if constexpr (std::is_pointer<T>::value) check_pointer((const void *)value, kernel, n, at);
    else if constexpr (std::is_class<T>::value) {
        T copy = value;
#ifdef EMULATOR_CLEAR_PADDING
        EMULATOR_CLEAR_PADDING(&copy);
#endif
        check_words((const char *)&copy, sizeof copy, kernel, n, at);
    }
}

inline void start(Launch &&launch, cudaStream_t stream) {
    dim3 g = launch.grid, b = launch.block;
    size_t threads = (size_t)b.x * b.y * b.z;
    auto allowed = shared_allowed.find(launch.kernel);
    size_t most = allowed == shared_allowed.end() ? SHARED_WITHOUT_ASKING : (size_t)allowed->second;
    cudaError_t error = cudaSuccess;
    if (asked_to_fail()) error = cudaErrorLaunchOutOfResources;
    else if (fault != cudaSuccess) error = fault;
    else if (check_stream(stream, launch.at) != cudaSuccess) error = cudaErrorInvalidResourceHandle;
    else if (!threads || threads > MAX_THREADS || b.z > 64 || !g.x || !g.y || !g.z ||
             g.x > 0x7FFFFFFF || g.y > 65535 || g.z > 65535) error = cudaErrorInvalidConfiguration;
    else if (launch.shared > most) error = cudaErrorInvalidValue;
    else {
        auto shared_launch = std::make_shared<Launch>(std::move(launch));
        error = submit(stream, [shared_launch] { run_grid(*shared_launch); });
    }
    if (error != cudaSuccess) last_error = error, unseen_launch_failure = true;
}

} // namespace emulator

// What translate.sh makes of `kernel<<<grid, block, shared, stream>>>(arguments)`.
template <class... P> struct EmulatedLaunch {
    void (*kernel)(P...);
    const char *name;
    emulator::Place at;
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;

    void operator()(P... arguments) const {
        static_assert((sizeof(P) + ... + 0) <= 4096, "kernels take at most 4096 bytes");
        int n = 0;
        (emulator::check_argument(arguments, name, ++n, at), ...);
        auto k = kernel;
        emulator::start({name, at, grid, block, shared, (const void *)kernel,
                         [k, arguments...] { k(arguments...); }}, stream);
    }
};
template <class... P>
EmulatedLaunch<P...> emulated_launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block,
                                     size_t shared = 0, cudaStream_t stream = nullptr,
                                     EMULATOR_HERE) {
    return {kernel, name, at, grid, block, shared, stream};
}

// =================================================================================================
//  Errors, devices
// =================================================================================================

inline const char *cudaGetErrorName(cudaError_t error) {
#define EMULATOR_NAME(name, value, text) case value: return "cuda" #name;
    switch ((int)error) { EMULATOR_ERRORS(EMULATOR_NAME) }
    return "unrecognized error code";
}
inline const char *cudaGetErrorString(cudaError_t error) {
#define EMULATOR_TEXT(name, value, text) case value: return text;
    switch ((int)error) { EMULATOR_ERRORS(EMULATOR_TEXT) }
    return "unrecognized error code";
}

inline cudaError_t cudaPeekAtLastError() {
    emulator::unseen_launch_failure = false;
    EMULATED_CALL(cudaErrorUnknown);
    return emulator::last_error;
}
inline cudaError_t cudaGetLastError() {
    cudaError_t error = cudaPeekAtLastError();
    emulator::last_error = cudaSuccess;
    return error;
}

struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, l2CacheSize;
    int memoryBusWidth, integrated;
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
};
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10, cudaDevAttrMultiProcessorCount = 16, cudaDevAttrL2CacheSize = 38,
    cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};

inline cudaError_t cudaGetDeviceCount(int *count) {
    EMULATED_CALL(cudaErrorInsufficientDriver);
    *count = (int)emulator::options.devices;
    return emulator::fail(*count ? cudaSuccess : cudaErrorNoDevice);
}
inline cudaError_t cudaSetDevice(int device) {
    EMULATED_CALL(cudaErrorInvalidDevice);
    bool there = device >= 0 && device < emulator::options.devices;
    return emulator::fail(there ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaGetDevice(int *device) {
    EMULATED_CALL(cudaErrorUnknown);
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int device) {
    EMULATED_CALL(cudaErrorInvalidDevice);
    if (device < 0 || device >= emulator::options.devices)
        return emulator::fail(cudaErrorInvalidDevice);
    *prop = {};
    snprintf(prop->name, sizeof prop->name, "CUDA on CPU");
    prop->major = (int)emulator::options.sm / 10, prop->minor = (int)emulator::options.sm % 10;
    prop->multiProcessorCount = 2, prop->warpSize = 32, prop->maxThreadsPerBlock = 1024;
    prop->l2CacheSize = 1 << 20, prop->memoryBusWidth = 64;
    prop->totalGlobalMem = (size_t)emulator::options.memory;
    prop->sharedMemPerBlock = emulator::SHARED_WITHOUT_ASKING;
    prop->sharedMemPerBlockOptin = (size_t)emulator::options.shared;
    prop->sharedMemPerMultiprocessor = prop->sharedMemPerBlockOptin + 1024;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    cudaDeviceProp prop;
    if (cudaError_t error = cudaGetDeviceProperties(&prop, device)) return error;
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = prop.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)prop.sharedMemPerBlock; break;
    case cudaDevAttrWarpSize: *value = prop.warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = prop.multiProcessorCount; break;
    case cudaDevAttrL2CacheSize: *value = prop.l2CacheSize; break;
    case cudaDevAttrComputeCapabilityMajor: *value = prop.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = prop.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)prop.sharedMemPerBlockOptin; break;
    default: return emulator::fail(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int *version) {
    EMULATED_CALL(cudaErrorUnknown);
    *version = 13000;
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
template <class T>
cudaError_t cudaFuncSetAttribute(T *kernel, cudaFuncAttribute attribute, int value) {
    EMULATED_CALL(cudaErrorInvalidValue);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > emulator::options.shared) return emulator::fail(cudaErrorInvalidValue);
    emulator::shared_allowed[(const void *)kernel] = value;
    return cudaSuccess;
}

// =================================================================================================
//  Memory
// =================================================================================================

inline cudaError_t cudaMalloc(void **pointer, size_t bytes, EMULATOR_HERE) {
    EMULATED_CALL_NOT_CAPTURED(cudaErrorMemoryAllocation);
    bool asked = emulator::options.fail_malloc > 0 && --emulator::options.fail_malloc == 0;
    void *p = asked ? nullptr : bytes ? emulator::allocate(bytes, at) : nullptr;
    if (bytes && !p) return emulator::fail(cudaErrorMemoryAllocation);
    *pointer = p;
    return cudaSuccess;
}
template <class T> cudaError_t cudaMalloc(T **pointer, size_t bytes, EMULATOR_HERE) {
    return cudaMalloc((void **)pointer, bytes, at);
}

// Calls that destroy do so even when they are asked to fail, as the real ones do.
inline cudaError_t cudaFree(void *pointer, EMULATOR_HERE) {
    bool failing = emulator::asked_to_fail();
    if (pointer && emulator::breaks_capture())
        return emulator::fail(cudaErrorStreamCaptureUnsupported);
    if (pointer) emulator::run_all();
    for (size_t i = 0; pointer && i < emulator::buffers.size(); i++)
        if (emulator::buffers[i].data == pointer) {
            emulator::release(i);
            pointer = nullptr;
        }
    if (pointer) {
        emulator::report(at, "double free, or a pointer cudaMalloc never gave: %p", pointer);
        return emulator::fail(cudaErrorInvalidValue);
    }
    return failing ? emulator::fail(cudaErrorUnknown) : emulator::fault;
}

inline cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned, EMULATOR_HERE) {
    EMULATED_CALL_NOT_CAPTURED(cudaErrorMemoryAllocation);
    char *p = (char *)malloc(bytes ? bytes : 1);
    if (!p) return emulator::fail(cudaErrorMemoryAllocation);
    memset(p, emulator::UNWRITTEN, bytes);
    emulator::pinned.push_back({p, p, bytes, bytes, ++emulator::mallocs, at});
    *pointer = p;
    return cudaSuccess;
}
template <class T>
cudaError_t cudaHostAlloc(T **pointer, size_t bytes, unsigned flags, EMULATOR_HERE) {
    return cudaHostAlloc((void **)pointer, bytes, flags, at);
}
template <class T>
cudaError_t cudaMallocHost(T **pointer, size_t bytes, unsigned flags = 0, EMULATOR_HERE) {
    return cudaHostAlloc((void **)pointer, bytes, flags, at);
}
inline cudaError_t cudaFreeHost(void *pointer, EMULATOR_HERE) {
    bool failing = emulator::asked_to_fail();
    auto &list = emulator::pinned;
    if (pointer) emulator::run_all();
    for (size_t i = 0; pointer && i < list.size(); i++)
        if (list[i].data == pointer) {
            free(pointer);
            list.erase(list.begin() + (long)i);
            pointer = nullptr;
        }
    if (pointer) {
        emulator::report(at, "double free, or a pointer cudaMallocHost never gave: %p", pointer);
        return emulator::fail(cudaErrorInvalidValue);
    }
    return failing ? emulator::fail(cudaErrorUnknown) : emulator::fault;
}

inline cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    EMULATED_CALL(cudaErrorUnknown);
    *total = (size_t)emulator::options.memory;
    *available = *total - emulator::device_used;
    return cudaSuccess;
}

namespace emulator {

// Is this side of a copy where the direction says? Reports and returns false if not.
inline bool check_side(const char *what, const void *p, size_t n, bool device, Place at) {
    if (device ? find(buffers, p, n) != nullptr : !on_device(p)) return true;
    if (device && on_device(p)) report(at, "%s: out of bounds, %zu bytes at %p exceed the device "
                                       "buffer", what, n, p);
    else report(at, "%s: wrong direction, %p is %s memory", what, p, device ? "host" : "device");
    return false;
}

// Sorts out who may read what when. *wait: the call returns only when the copy is done.
inline cudaError_t copy(void *to, const void *from, size_t n, cudaMemcpyKind kind,
                        cudaStream_t stream, bool wait, Place at) {
    if (cudaError_t error = check_stream(stream, at)) return error;
    if (n == 0) return cudaSuccess;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind == cudaMemcpyDefault) to_device = on_device(to), from_device = on_device(from);
    if (!check_side("cudaMemcpy to", to, n, to_device, at) ||
        !check_side("cudaMemcpy from", from, n, from_device, at))
        return fail(cudaErrorInvalidValue);

    bool capturing = stream_of(stream)->capture != nullptr;
    std::vector<char> staged;   // pageable host memory is read at once, pinned memory in its turn
    if (!from_device && !capturing && !wait && !find(pinned, from, n))
        staged.assign((const char *)from, (const char *)from + n);
    if (!to_device && !find(pinned, to, n)) wait = wait || !capturing;
    else if (!to_device && !wait && options.lazy && !capturing) memset(to, UNWRITTEN, n);
    if (to_device && from_device) wait = false;

    auto run = [=, staged = std::move(staged)] {
        DeviceWork work;
        memmove(to, staged.empty() ? from : staged.data(), n);
    };
    if (cudaError_t error = submit(stream, std::move(run))) return error;
    if (wait) run_until(stream_of(stream), stream_of(stream)->issued);
    return fault;
}

inline cudaError_t fill(void *to, int value, size_t n, cudaStream_t stream, Place at) {
    if (cudaError_t error = check_stream(stream, at)) return error;
    if (n && !check_side("cudaMemset", to, n, true, at)) return fail(cudaErrorInvalidValue);
    if (cudaError_t error = submit(stream, [=] { DeviceWork work; memset(to, value, n); }))
        return error;
    return fault;
}

} // namespace emulator

inline cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind,
                              EMULATOR_HERE) {
    EMULATED_CALL_NOT_CAPTURED(cudaErrorInvalidValue);
    return emulator::copy(to, from, n, kind, nullptr, true, at);
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr, EMULATOR_HERE) {
    EMULATED_CALL(cudaErrorInvalidValue);
    return emulator::copy(to, from, n, kind, stream, false, at);
}
inline cudaError_t cudaMemset(void *to, int value, size_t n, EMULATOR_HERE) {
    EMULATED_CALL_NOT_CAPTURED(cudaErrorInvalidValue);
    return emulator::fill(to, value, n, nullptr, at);
}
inline cudaError_t cudaMemsetAsync(void *to, int value, size_t n, cudaStream_t stream = nullptr,
                                   EMULATOR_HERE) {
    EMULATED_CALL(cudaErrorInvalidValue);
    return emulator::fill(to, value, n, stream, at);
}

// =================================================================================================
//  Streams, events, graphs
// =================================================================================================

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags, EMULATOR_HERE) {
    EMULATED_CALL(cudaErrorUnknown);
    *stream = new CUstream_st{!(flags & cudaStreamNonBlocking), true, {}, 0, 0, nullptr, 0, 0};
    emulator::streams.push_back(*stream);
    emulator::handles[*stream] = {"stream", at};
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t *stream, EMULATOR_HERE) {
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault, at);
}
// The stream finishes its work first; what others wait for in it stays known.
inline cudaError_t cudaStreamDestroy(cudaStream_t stream, EMULATOR_HERE) {
    bool failing = emulator::asked_to_fail();
    if (cudaError_t error = emulator::check_handle(stream, "stream", at)) return error;
    emulator::run_until(stream, stream->issued);
    emulator::handles.erase(stream);
    stream->alive = stream->blocking = false;
    return failing ? emulator::fail(cudaErrorUnknown) : emulator::fault;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream, EMULATOR_HERE) {
    EMULATED_CALL_NOT_CAPTURED(cudaErrorUnknown);
    if (cudaError_t error = emulator::check_stream(stream, at)) return error;
    CUstream_st *s = emulator::stream_of(stream);
    if (!stream)                // the legacy stream is not idle while blocking ones are busy
        for (CUstream_st *other : emulator::streams)
            if (other->blocking) emulator::run_until(other, other->issued);
    emulator::run_until(s, s->issued);
    return emulator::fault;
}
inline cudaError_t cudaDeviceSynchronize() {
    EMULATED_CALL_NOT_CAPTURED(cudaErrorUnknown);
    emulator::run_all();
    return emulator::fault;
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags, EMULATOR_HERE) {
    EMULATED_CALL(cudaErrorUnknown);
    *event = new CUevent_st{nullptr, 0, false, !(flags & cudaEventDisableTiming), 0};
    emulator::handles[*event] = {"event", at};
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t *event, EMULATOR_HERE) {
    return cudaEventCreateWithFlags(event, cudaEventDefault, at);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event, EMULATOR_HERE) {
    bool failing = emulator::asked_to_fail();
    if (cudaError_t error = emulator::check_handle(event, "event", at)) return error;
    if (event->stream) emulator::run_until(event->stream, event->count);    // it writes its time
    emulator::handles.erase(event);
    delete event;
    return failing ? emulator::fail(cudaErrorUnknown) : emulator::fault;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr,
                                   EMULATOR_HERE) {
    EMULATED_CALL(cudaErrorUnknown);
    if (cudaError_t error = emulator::check_handle(event, "event", at)) return error;
    if (cudaError_t error = emulator::check_stream(stream, at)) return error;
    CUstream_st *s = emulator::stream_of(stream);
    event->captured = s->capture != nullptr;
    event->stream = s;
    if (event->captured) return event->count = s->recorded, cudaSuccess;
    event->count = s->issued + 1;
    return emulator::submit(stream, [event] {
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        event->time = (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
    });
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event, EMULATOR_HERE) {
    EMULATED_CALL_NOT_CAPTURED(cudaErrorUnknown);
    if (cudaError_t error = emulator::check_handle(event, "event", at)) return error;
    if (event->captured) return emulator::fail(cudaErrorInvalidValue);
    if (event->stream) emulator::run_until(event->stream, event->count);
    return emulator::fault;
}
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end,
                                        EMULATOR_HERE) {
    EMULATED_CALL(cudaErrorUnknown);
    for (cudaEvent_t event : {begin, end}) {
        if (cudaError_t error = emulator::check_handle(event, "event", at)) return error;
        if (!event->timing || !event->stream || event->captured)
            return emulator::fail(cudaErrorInvalidResourceHandle);
        if (event->stream->done < event->count) return emulator::fail(cudaErrorNotReady);
    }
    *ms = (float)(end->time - begin->time);
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0,
                                       EMULATOR_HERE) {
    EMULATED_CALL(cudaErrorUnknown);
    if (cudaError_t error = emulator::check_handle(event, "event", at)) return error;
    if (cudaError_t error = emulator::check_stream(stream, at)) return error;
    CUstream_st *s = emulator::stream_of(stream), *other = event->stream;
    if (!other) return cudaSuccess;             // never recorded: nothing to wait for
    if (!event->captured) return emulator::submit(stream, [] {}, {{other, event->count}});
    // Waiting for an event of a capture makes the stream take part in it.
    if (!other->capture) return emulator::fail(cudaErrorStreamCaptureInvalidated);
    if (!s->capture) s->capture = other->capture, s->recorded = s->joined = 0;
    if (s->capture->origin == s) other->joined = event->count;
    return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode,
                                          EMULATOR_HERE) {
    EMULATED_CALL(cudaErrorUnknown);
    if (!stream) return emulator::fail(cudaErrorStreamCaptureUnsupported);
    if (cudaError_t error = emulator::check_stream(stream, at)) return error;
    if (stream->capture) return emulator::fail(cudaErrorInvalidValue);
    stream->capture = new EmulatedCapture{new CUgraph_st(), stream,
                                          mode == cudaStreamCaptureModeRelaxed, false};
    stream->recorded = stream->joined = 0;
    emulator::captures.push_back(stream->capture);
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph, EMULATOR_HERE) {
    bool failing = emulator::asked_to_fail();
    *graph = nullptr;
    if (cudaError_t error = emulator::check_stream(stream, at)) return error;
    EmulatedCapture *capture = emulator::stream_of(stream)->capture;
    if (!capture || capture->origin != stream)
        return emulator::fail(cudaErrorStreamCaptureUnmatched);
    cudaError_t error = failing ? cudaErrorUnknown : capture->broken ?
                        cudaErrorStreamCaptureInvalidated : emulator::fault;
    for (CUstream_st *s : emulator::streams)
        if (s->capture == capture) {
            if (!error && s != stream && s->joined < s->recorded)
                error = cudaErrorStreamCaptureUnjoined;
            s->capture = nullptr;
        }
    auto &all = emulator::captures;
    for (size_t i = 0; i < all.size(); i++)
        if (all[i] == capture) all.erase(all.begin() + (long)i--);
    if (error) delete capture->graph;
    else {
        *graph = capture->graph;
        emulator::handles[*graph] = {"graph", at};
    }
    delete capture;
    return emulator::fail(error);
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph,
                                        unsigned long long = 0, EMULATOR_HERE) {
    EMULATED_CALL(cudaErrorMemoryAllocation);
    if (cudaError_t error = emulator::check_handle(graph, "graph", at)) return error;
    *exec = new CUgraphExec_st{graph->ops};
    emulator::handles[*exec] = {"executable graph", at};
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream, EMULATOR_HERE) {
    EMULATED_CALL(cudaErrorUnknown);
    if (cudaError_t error = emulator::check_handle(exec, "executable graph", at)) return error;
    if (cudaError_t error = emulator::check_stream(stream, at)) return error;
    auto ops = exec->ops;
    cudaError_t error = emulator::submit(stream, [ops] {
        for (const EmulatedOp &op : ops)
            if (emulator::fault == cudaSuccess) op.run();
    });
    return error ? error : emulator::fault;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec, EMULATOR_HERE) {
    bool failing = emulator::asked_to_fail();
    if (cudaError_t error = emulator::check_handle(exec, "executable graph", at)) return error;
    emulator::handles.erase(exec);
    delete exec;
    return failing ? emulator::fail(cudaErrorUnknown) : emulator::fault;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph, EMULATOR_HERE) {
    bool failing = emulator::asked_to_fail();
    if (cudaError_t error = emulator::check_handle(graph, "graph", at)) return error;
    emulator::handles.erase(graph);
    delete graph;
    return failing ? emulator::fail(cudaErrorUnknown) : emulator::fault;
}

// =================================================================================================
//  For tests
// =================================================================================================

namespace emulator {

struct Option { const char *name; long Options::*value; const char *words[5]; };
inline const Option option_table[] = {
    {"schedule", &Options::schedule, {"ascending", "descending", "random", "warp", nullptr}},
    {"blocks", &Options::blocks, {"ascending", "descending", "random", nullptr, nullptr}},
    {"seed", &Options::seed, {}},           {"unordered", &Options::unordered, {}},
    {"lazy", &Options::lazy, {}},           {"protect", &Options::protect, {}},
    {"memory", &Options::memory, {}},       {"shared", &Options::shared, {}},
    {"devices", &Options::devices, {}},     {"sm", &Options::sm, {}},
    {"fail_call", &Options::fail_call, {}}, {"fail_malloc", &Options::fail_malloc, {}},
    {"no_cublas", &Options::no_cublas, {}}, {"timeout", &Options::timeout, {}},
    {"abort", &Options::abort, {}},
};

inline bool set_option(const std::string &word) {
    size_t equals = word.find('=');
    std::string name = word.substr(0, equals), value;
    if (equals != std::string::npos) value = word.substr(equals + 1);
    for (const Option &option : option_table) {
        if (name != option.name) continue;
        for (int i = 0; option.words[i]; i++)
            if (value == option.words[i]) return options.*option.value = i, true;
        if (option.words[0]) return false;
        char *end = nullptr;
        long number = equals == std::string::npos ? 1 : strtol(value.c_str(), &end, 10);
        if (end && end == value.c_str()) return false;
        for (const char *unit = "kmg"; end && *end && *unit; unit++) {
            number *= 1024;
            if (*end == *unit) end++;
        }
        if (end && *end) return false;
        options.*option.value = number;
        return true;
    }
    if (word == "default") options = Options();
    return word == "default";
}

} // namespace emulator

extern "C" {

// Options as in CUDA_EMULATOR, changed from now on. Names words it does not know and returns -1.
__attribute__((used)) inline int emulator_set(const char *words) {
    int result = 0;
    emulator::run_all();
    for (const char *p = words; *p;) {
        size_t n = strcspn(p, " ,"), blank = p[n] != 0;
        if (n && !emulator::set_option(std::string(p, n))) {
            fprintf(stderr, "CUDA emulator: no such option: %.*s\n", (int)n, p);
            result = -1;
        }
        p += n + blank;
    }
    emulator::random_state = (uint64_t)emulator::options.seed + 1;
    emulator::protect_buffers(!emulator::options.protect);
    return result;
}

// Errors reported so far: a test that made none expects 0.
__attribute__((used)) inline long emulator_failures(void) { return emulator::failures; }
__attribute__((used)) inline long emulator_calls(void) { return emulator::calls; }
__attribute__((used)) inline long emulator_launches(void) { return emulator::launches; }
__attribute__((used)) inline size_t emulator_device_bytes(void) { return emulator::device_used; }

// Forgets errors, the sticky ones too, and all work not done. Memory and handles stay.
__attribute__((used)) inline void emulator_reset(void) {
    for (CUstream_st *s : emulator::streams) s->queue.clear(), s->done = s->issued;
    emulator::failures = 0;
    emulator::fault = emulator::last_error = cudaSuccess;
    emulator::unseen_launch_failure = false;
}

// Reports everything that is still allocated and returns how much that is.
__attribute__((used)) inline int emulator_leaks(void) {
    emulator::run_all();
    int n = 0;
    for (auto &b : emulator::buffers)
        emulator::report(b.at, "leak: %zu bytes of device memory, allocated", b.bytes), n++;
    for (auto &b : emulator::pinned)
        emulator::report(b.at, "leak: %zu bytes of pinned memory, allocated", b.bytes), n++;
    for (auto &h : emulator::handles)
        emulator::report(h.second.at, "leak: %s, made", h.second.kind), n++;
    return n;
}

} // extern "C"

namespace emulator {

// A program that forgot to ask fails all the same.
inline void say_at_exit() {
    emulator_leaks();
    if (unseen_launch_failure) report({nullptr, 0}, "a launch failed, and nobody looked");
    for (CUstream_st *s : streams)
        if (s != &legacy_stream) delete s;
    for (Thread &thread : block.thread) free(thread.copies);
    if (failures) {
        fprintf(stderr, "CUDA emulator: %ld errors\n", failures);
        fflush(nullptr);
        _exit(65);
    }
}

inline const bool from_environment = [] {
    const char *words = getenv("CUDA_EMULATOR");
    if (words && emulator_set(words)) exit(2);
    return true;
}();

} // namespace emulator
