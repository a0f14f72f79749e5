/* Byte planes of 16-bit floats.
 *
 * Every little-endian value is rotated left by one bit, so that the sign leaves the exponent: the
 * high byte of a bf16 is then its whole exponent, of an f16 its exponent and three bits of mantissa.
 * High bytes are worth coding, low bytes are noise. */
#ifndef FL_PLANES_H
#define FL_PLANES_H

#include <stddef.h>
#include <stdint.h>

/* values: 2 * n_values bytes; high, low: n_values bytes each.  No overlap. */
void fl_planes_split16(const uint8_t *restrict values, size_t n_values, uint8_t *restrict high,
                       uint8_t *restrict low);
void fl_planes_join16(const uint8_t *restrict high, const uint8_t *restrict low, size_t n_values,
                      uint8_t *restrict values);

#endif
