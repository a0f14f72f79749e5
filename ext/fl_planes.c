/* Plain loops over bytes: the compiler vectorises both for the baseline (16 values at a time), and
 * they read and write nothing wider than a byte, so neither order nor alignment matters. */
#include "fl_planes.h"

void fl_planes_split16(const uint8_t *restrict values, size_t n_values, uint8_t *restrict high,
                       uint8_t *restrict low)
{
    for (size_t i = 0; i < n_values; i++) {
        const uint8_t lower = values[2 * i], upper = values[2 * i + 1];
        high[i] = (uint8_t)(upper << 1 | lower >> 7);
        low[i] = (uint8_t)(lower << 1 | upper >> 7);
    }
}

void fl_planes_join16(const uint8_t *restrict high, const uint8_t *restrict low, size_t n_values,
                      uint8_t *restrict values)
{
    for (size_t i = 0; i < n_values; i++) {
        const uint8_t upper = high[i], lower = low[i];
        values[2 * i] = (uint8_t)(upper << 7 | lower >> 1);
        values[2 * i + 1] = (uint8_t)(lower << 7 | upper >> 1);
    }
}
