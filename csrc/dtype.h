// What a launcher is told about a tensor's elements.
#pragma once

namespace clone_fast {

// The dtypes of the fast leaves; `DTYPES` in clone_fast/cuda/__init__.py holds the same numbers.
enum class Dtype : int { float32 = 0, float16 = 1, bfloat16 = 2 };

}  // namespace clone_fast
