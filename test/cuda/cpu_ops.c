// cpu_ops.c: what test_ops.cpp needs of qlora.c, whose functions are static: the CPU's op table and
// how it reads a weight.
#include "../../qlora.c"

static void *test_allocate(void *user, size_t bytes) { (void)user; return malloc(bytes); }
static void test_release(void *user, void *p, size_t bytes) { (void)user; (void)bytes; free(p); }
static const qlora_allocator test_allocator = {test_allocate, test_release, NULL};

// Opens the CPU with one thread: the plain kernels, the specification.
int cpu_open(Device *dev, DType act) {
    *dev = (Device){.ops = &plain_ops, .act = act, .allocator = &test_allocator};
    dev->pool = pool_open(1, &test_allocator, NULL);
    return dev->pool ? 0 : -1;
}
void cpu_close(Device *dev) { pool_close(dev->pool); }

// The tables of a 4-bit type, and the levels that scales are quantised to.
void cpu_tables(float levels[16], float map[256], DType type) {
    memcpy(levels, type == DT_NF4 ? nf4_levels : fp4_levels, sizeof nf4_levels);
    dynamic_map(map);
}

const qlora_allocator *cpu_allocator(void) { return &test_allocator; }
