// Scratch memory that is kept between calls.
#pragma once
#include <cstdint>
#include <vector>

namespace infoquant {

// Values from the start of a cache line on: a load that crosses two lines takes twice as long.
template <typename T>
class Buffer {
  public:
    T* reserve(int64_t size) {
        if ((int64_t)(lines_.size() * sizeof(Line)) < size * (int64_t)sizeof(T)) {
            lines_.resize((size * sizeof(T) + sizeof(Line) - 1) / sizeof(Line));
        }
        return reinterpret_cast<T*>(lines_.data());
    }

  private:
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<Line> lines_;
};

}  // namespace infoquant
