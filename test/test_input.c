#define INPUT_TESTS
