#!/bin/sh
# translate.sh qlora.cu > build/qlora_emulated.cpp: makes C++ of CUDA for cuda_on_cpu.h. Lines keep
# their numbers. What these substitutions miss does not compile, so nothing passes silently.
#
#   kernel<A, B><<<grid, block, shared, stream>>>(x, y);
#       emulated_launch("kernel<A, B>", kernel<A, B>, grid, block, shared, stream)(x, y);
#   extern __shared__ __align__(16) unsigned char memory[];
#       auto *memory = emulated_dynamic_shared<unsigned char, 16>();
#   __shared__ float tile[32][33];
#       auto &tile = emulated_shared<float [32][33]>("tile");
#   __shared__ __align__(16) float sum;
#       auto &sum = emulated_shared<float , 16>("sum");
type='([A-Za-z_][A-Za-z0-9_:]*( +[A-Za-z_][A-Za-z0-9_:]*)*(<[^;]*>)?)'
name='([A-Za-z_][A-Za-z0-9_]*)'
align='(__align__|alignas) *\(([^()]*(\([^()]*\))?)\)'
printf '#line 1 "%s"\n' "$1"
exec sed -E \
    -e "s/$name( *<[^<>;]*>)? *<<<(.*)>>> *\(/emulated_launch(\"\1\2\", \1\2, \3)(/" \
    -e "s/extern +__shared__ +$align +$type +$name *\[ *\] *;/auto *\7 = emulated_dynamic_shared<\4, \2>();/" \
    -e "s/extern +__shared__ +$type +$name *\[ *\] *;/auto *\4 = emulated_dynamic_shared<\1>();/" \
    -e "s/__shared__ +$align +$type +$name *((\[[^]]*\])*) *;/auto \&\7 = emulated_shared<\4 \8, \2>(\"\7\");/" \
    -e "s/__shared__ +$type +$name *((\[[^]]*\])*) *;/auto \&\4 = emulated_shared<\1 \5>(\"\4\");/" \
    -e 's/^( *)#pragma unroll.*/\1/' \
    "$1"
