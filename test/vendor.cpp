// The header from C++17: opens a model, asks for logits.
#include "qlora.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    qlora_error err = {};
    qlora_options options = qlora_default_options();
    options.quant = QLORA_QUANT_NONE;
    std::unique_ptr<qlora_model, decltype(&qlora_close)> model(qlora_open(argv[1], &options, &err),
                                                              qlora_close);
    if (!model) return std::fprintf(stderr, "%s\n", err.text), 1;
    const std::vector<int32_t> ids = {1, 2, 3};
    std::vector<float> logits(ids.size() * qlora_info(model.get()).vocab);
    if (qlora_logits(model.get(), ids.data(), ids.size(), logits.data(), &err) != 0)
        return std::fprintf(stderr, "%s\n", err.text), 1;
    for (float z : logits)
        if (!std::isfinite(z)) return 1;
    return 0;
}
