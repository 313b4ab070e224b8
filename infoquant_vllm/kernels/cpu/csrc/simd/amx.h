// AMX has eight tile registers of 16 rows of 64 bytes. One instruction adds A [16, 64] @ B [64, 16] of bytes to sums
// [16, 16] of int32; B lies in its register as [16, 16, 4], four rows side by side. Intel 64 and IA-32 Architectures
// Optimization Reference Manual, chapter 20.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace infoquant::amx {

// Configures the tile registers of this thread, and releases them at the end of the scope.
class TileConfig {
public:
    TileConfig() {
        Config config{};
        config.palette = 1;
        for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
        _tile_loadconfig(&config);
    }
    ~TileConfig() { _tile_release(); }
    TileConfig(const TileConfig&) = delete;
    TileConfig& operator=(const TileConfig&) = delete;

private:
    struct Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    };
};

}  // namespace infoquant::amx
