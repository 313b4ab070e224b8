// AMX: eight registers of 16 rows of 64 bytes. A product adds to sums [16, 16] in 32 bits what 16 rows of 64 signed bytes
// and 64 rows of 16 unsigned ones give, the latter as lines of four: [16, 16, 4]. Intel 64 and IA-32 Architectures
// Optimization Reference Manual, chapter 20.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace amx {

// The registers' shapes, in the calling thread, for as long as this lives.
class Shapes {
public:
    Shapes() {
        Config config{};
        config.palette = 1;
        for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
        _tile_loadconfig(&config);
    }
    ~Shapes() { _tile_release(); }
    Shapes(const Shapes&) = delete;
    Shapes& operator=(const Shapes&) = delete;

private:
    struct Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    };
};

}  // namespace amx
