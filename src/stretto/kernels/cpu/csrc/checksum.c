/* Fletcher's checksum (1982) with four-byte words and eight-byte sums, in lanes: as fast as memory is read. */
#include "api.h"

#include <string.h>

#define LANES 8
#define MIX 0x9e3779b97f4a7c15u

typedef uint64_t Sums __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

/* Any change within one word, and any exchange of two words, changes the result. */
__attribute__((visibility("default"))) uint64_t stretto_checksum(const uint8_t *data, int64_t bytes)
{
    Sums sum[LANES / 2] = {{0}}, weighted[LANES / 2] = {{0}};
    uint8_t last[LANES * 4] = {0};
    int64_t whole = bytes / (LANES * 4) * (LANES * 4);
    memcpy(last, data + whole, (size_t)(bytes - whole));
    for (int64_t i = 0; i <= whole; i += LANES * 4) {
        const uint8_t *line = i < whole ? data + i : last;
        for (int half = 0; half < 2; half++) {
            Words words, zeros = {0};
            memcpy(&words, line + half * 16, 16);
            sum[half * 2] += (Sums)__builtin_shuffle(words, zeros, (Words){0, 4, 1, 5});
            sum[half * 2 + 1] += (Sums)__builtin_shuffle(words, zeros, (Words){2, 4, 3, 5});
        }
        for (int pair = 0; pair < LANES / 2; pair++)
            weighted[pair] += sum[pair];
    }
    uint64_t result = (uint64_t)bytes;
    for (int lane = 0; lane < LANES; lane++) {
        result = (result ^ sum[lane / 2][lane % 2]) * MIX;
        result = (result ^ result >> 29 ^ weighted[lane / 2][lane % 2]) * MIX;
    }
    return result ^ result >> 29;
}
