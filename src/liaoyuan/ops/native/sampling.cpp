// The next token of every row: penalties, grammar mask, temperature, top-k, top-p, min-p and the draw, row by row.
//
// A row of logits is read from memory once and worked on in the caches; weights are computed where they are used, since
// that costs less than to keep them. Filters leave the best so many tokens, so only candidates near the peak are looked
// at, and more of them if these do not suffice. Sums run over chunks of 64 in fp32, then in fp64; a row's bits depend
// on that row alone.
#include <algorithm>
#include <cmath>
#include <vector>

#include "denominator.h"
#include "kernels.h"

namespace liaoyuan {

namespace {

// Least weights of candidates, against the peak's, one after the other until they suffice.
constexpr float CANDIDATES[] = {0x1p-2f,  0x1p-4f,  0x1p-6f,  0x1p-8f,  0x1p-10f,
                                0x1p-12f, 0x1p-15f, 0x1p-18f, 0x1p-24f, 0.0f};

struct Candidate {
  float weight;
  int32_t token;
};
// No function, since a type of its own lets sorting inline it.
constexpr auto is_before = [](const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
};

struct Drawn {
  int64_t token;
  double share;  // of what the filters left
};

// The sum of each of sixteen vectors, in the order of `sum`; or the highest lane.
template <class Join>
Vec fold_each(const Vec* parts, const Join& join) {
  Vec lane[LANES];
  transpose(parts, sizeof(Vec), lane);
#pragma GCC unroll 4
  for (int width = LANES / 2; width; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) lane[i] = join(lane[i], lane[i + width]);
  return lane[0];
}

int64_t blocks_of(int64_t count) { return (count + BLOCK - 1) / BLOCK; }

// tops: the highest score of every chunk; returns that of the row.
template <class T>
float find_tops(const T* scores, int64_t count, float* tops) {
  Vec best = splat(NOTHING);
  over_blocks(scores, count, [&](int64_t block, auto score) {
    Vec parts[LANES];
    for (int64_t c = 0; c < LANES; ++c) {
      parts[c] = splat(NOTHING);
      for (int64_t i = 0; i < CHUNK; i += TWO) {
        Two some = score(c * CHUNK + i);
        parts[c] = maximum(some.second, maximum(some.first, parts[c]));
      }
    }
    Vec top = fold_each(parts, maximum);
    store(tops + block * LANES, top);
    best = maximum(top, best);
  });
  return highest(best);
}

// Tokens of the history; those after the prompt were generated and count for presence and frequency.
void penalise(float* scores, const int64_t* history, int64_t length, int64_t prompt, const SamplingRow& row,
              int64_t vocabulary) {
  std::vector<std::pair<int64_t, int>> seen;
  for (int64_t i = 0; i < length; ++i)
    if (history[i] >= 0 && history[i] < vocabulary) seen.push_back({history[i], i >= prompt});
  std::sort(seen.begin(), seen.end());
  for (size_t i = 0; i < seen.size();) {
    int64_t token = seen[i].first, count = 0;
    for (; i < seen.size() && seen[i].first == token; ++i) count += seen[i].second;
    float& score = scores[token];
    score = score > 0 ? score / float(row.repetition) : score * float(row.repetition);
    score -= float(row.frequency) * float(count) + (count ? float(row.presence) : 0.0f);
  }
}

void forbid(float* scores, int64_t count, const uint32_t* bits, int64_t words) {
  IntVec bit{};
  int32_t powers[LANES];
  for (int i = 0; i < LANES; ++i) powers[i] = 1 << i;
  read(powers, bit);
  for (int64_t i = 0; i < count; i += LANES) {
    uint32_t word = i / 32 < words ? bits[i / 32] >> (i % 32) & 0xffffu : 0;
    IntVec allowed = (bit & int32_t(word)) != IntVec{};
    store(scores + i, choose(allowed, scores_at(scores, i, count), splat(NOTHING)), count - i);
  }
}

template <class T>
int64_t first_highest(const T* scores, int64_t count) {
  Vec best = splat(NOTHING);
  IntVec place{}, lane = lane_numbers();
  for (int64_t i = 0; i < count; i += LANES) {
    Vec v = scores_at(scores, i, count);
    auto higher = v > best;
    place = (IntVec)choose(higher, (Vec)(lane + int32_t(i)), (Vec)place);
    best = choose(higher, v, best);
  }
  int64_t found = 0;
  for (int i = 0; i < LANES; ++i)
    if (i == 0 || best[i] > best[found] || (best[i] == best[found] && place[i] < place[found])) found = i;
  return place[found];
}

// What tokens weigh: exp((score - peak) / temperature).
template <class T>
struct Weights {
  const T* scores;
  int64_t count;
  float peak, inverse;  // of the temperature

  Vec of(Vec score) const { return power((score - peak) * inverse); }
  Vec at(int64_t i) const { return of(scores_at(scores, i, count)); }
  // sums: of the chunks; returns the total.
  double add_up(float* sums) const {
    double total = 0;
    over_blocks(scores, count, [&](int64_t block, auto score) {
      Vec parts[LANES] = {};
      for (int64_t c = 0; c < LANES; ++c)
        for (int64_t i = 0; i < CHUNK; i += TWO) {
          Two some = score(c * CHUNK + i);
          parts[c] += of(some.first);
          parts[c] += of(some.second);
        }
      float* own = sums + block * LANES;
      store(own, fold_each(parts, [](Vec a, Vec b) { return a + b; }));
      for (int i = 0; i < LANES; ++i) total += own[i];
    });
    return total;
  }
};

// The first token whose running sum exceeds goal.
template <class T>
Drawn draw(const Weights<T>& weights, const float* sums, double total, double uniform) {
  double goal = uniform * total, sum = 0;
  int64_t chunk = 0, last = 0;
  for (int64_t i = 0; i < blocks_of(weights.count) * LANES; ++i) {
    if (sums[i] > 0) last = i;
    if (sum + sums[i] > goal) break;
    sum += sums[i];
    chunk = i + 1;
  }
  chunk = std::min(chunk, last);
  float own[CHUNK];
  for (int64_t i = 0; i < CHUNK; i += LANES) store(own + i, weights.at(chunk * CHUNK + i));
  int64_t at = -1;
  for (int64_t i = 0; i < CHUNK; ++i) {
    if (own[i] > 0) at = i;  // rounding may leave the goal above the chunk: then its last token
    sum += own[i];
    if (sum > goal && at >= 0) break;
  }
  return at < 0 ? Drawn{-1, 0} : Drawn{chunk * CHUNK + at, own[at] / total};
}

template <class Body>
void each_bit(uint32_t bits, const Body& body) {
  for (; bits; bits &= bits - 1) body(__builtin_ctz(bits));
}

// Add the tokens that weigh at least `least`, more than nothing, and less than `below`.
template <class T>
void add_candidates(const Weights<T>& weights, const float* tops, float least, float below,
                    std::vector<Candidate>& found) {
  constexpr float LOWEST_POWER = -88, MARGIN = 1e-4f;  // a power is zero below, and wrong by much less
  float power = std::max(LOWEST_POWER, std::log(least) - MARGIN), less = least > 0 ? std::nextafter(least, 0.0f) : 0;
  for (int64_t block = 0; block < blocks_of(weights.count); ++block) {
    IntVec some = (load(tops + block * LANES) - weights.peak) * weights.inverse > power;
    each_bit(bits_of(some), [&](int chunk) {
      int64_t first = block * BLOCK + chunk * CHUNK;
      for (int64_t i = first; i < first + CHUNK; i += LANES) {
        Vec weight = weights.at(i);
        IntVec here = (weight > less) & (weight < below);
        each_bit(bits_of(here), [&](int lane) { found.push_back({weight[lane], int32_t(i + lane)}); });
      }
    });
  }
}

double mass_of(const std::vector<Candidate>& candidates) {
  double mass = 0;
  for (const Candidate& one : candidates) mass += one.weight;
  return mass;
}

// The best so many to the front, sorted, if `from` of them are already.
void sort_best(std::vector<Candidate>& found, size_t from, size_t to) {
  if (to < found.size()) std::nth_element(found.begin() + from, found.begin() + to, found.end(), is_before);
  std::sort(found.begin() + from, found.begin() + to, is_before);
}

// How many of the best have at least this mass; they are sorted, a few at first, since a few suffice as a rule.
size_t count_to_mass(std::vector<Candidate>& found, double goal) {
  double mass = 0;
  for (size_t i = 0, sorted = 0; i < found.size(); ++i) {
    if (i > 0 && !(mass < goal)) return i;
    if (i == sorted) sort_best(found, i, sorted = std::min(found.size(), 4 * i + 64));
    mass += found[i].weight;
  }
  return found.size();
}

// What the filters leave of all tokens, from the best on.
void filter(std::vector<Candidate>& found, const SamplingRow& row, double total) {
  bool sorts_all = row.top_k > 0 || !(row.top_p < 1);
  if (sorts_all) {
    size_t count = row.top_k > 0 && double(found.size()) > row.top_k ? size_t(row.top_k) : found.size();
    sort_best(found, 0, count);
    found.resize(count);
  }
  size_t count = found.size();
  if (row.top_p < 1) count = count_to_mass(found, row.top_p * (row.top_k > 0 ? mass_of(found) : total));
  while (count > 1 && found[count - 1].weight < row.min_p * found[0].weight) --count;
  found.resize(count);
}

template <class T>
std::vector<Candidate> left_by_filters(const Weights<T>& weights, const float* tops, double total,
                                       const SamplingRow& row) {
  // What min_p drops counts for top_p; without that it need not be looked at.
  float floor = row.top_p >= 1 && row.min_p > 0 ? float(row.min_p) * 0.999f : 0;
  std::vector<Candidate> found;
  float below = 2;  // no token weighs so much
  for (float level : CANDIDATES) {
    float least = std::max(level, floor);
    add_candidates(weights, tops, least, below, found);
    below = least;
    bool is_enough = level <= floor || (row.top_k == 0 && row.min_p >= level) ||
                     (row.top_k > 0 ? double(found.size()) >= row.top_k
                                    : row.top_p < 1 && mass_of(found) > row.top_p * total);
    if (is_enough) break;
  }
  filter(found, row, total);
  return found;
}

Drawn draw_filtered(const std::vector<Candidate>& left, double uniform) {
  double total = mass_of(left), sum = 0;
  for (size_t i = 0; i < left.size(); ++i)
    if ((sum += left[i].weight) > uniform * total || i + 1 == left.size())
      return {left[i].token, left[i].weight / total};
  return {-1, 0};
}

struct SamplingSpace {
  float *tops, *sums, *scores;
  double* factors;  // what each block raised the top by
  explicit SamplingSpace(int64_t vocabulary) {
    int64_t chunks = blocks_of(vocabulary) * LANES;
    factors = static_cast<double*>(scratch(0, size_t(4 * chunks + vocabulary) * sizeof(float)));
    tops = reinterpret_cast<float*>(factors + chunks), sums = tops + chunks, scores = sums + chunks;
  }
};

// The denominator of a row whose tops are known; if `keep`, the sums of its chunks too, against its highest score.
template <class T>
Denominator denominator_of(const T* logits, int64_t vocabulary, const SamplingSpace& space, bool keep) {
  Denominator found;
  over_blocks(logits, vocabulary, [&](int64_t block, auto score) {
    space.factors[block] = found.rise(highest(load(space.tops + block * LANES)));
    Vec parts[LANES];
    found.sum += sum_of_block(score, found.top, [](auto&...) {}, [&](int64_t c, Vec part) { parts[c] = part; });
    if (keep) store(space.sums + block * LANES, fold_each(parts, [](Vec a, Vec b) { return a + b; }));
  });
  double factor = 1;
  for (int64_t block = keep ? blocks_of(vocabulary) - 1 : -1; block >= 0; factor *= space.factors[block--])
    if (factor != 1) store(space.sums + block * LANES, load(space.sums + block * LANES) * float(factor));
  return found;
}

// total: of the weights at temperature 1, or less than zero if it is not known.
template <class T>
Drawn draw_warm(const Weights<T>& weights, const SamplingSpace& space, double total, const SamplingRow& row) {
  bool is_filtered = row.top_k > 0 || row.top_p < 1 || row.min_p > 0;
  bool uses_total = !is_filtered || (row.top_k == 0 && row.top_p < 1);
  if (uses_total && (total < 0 || row.temperature != 1)) total = weights.add_up(space.sums);
  return is_filtered ? draw_filtered(left_by_filters(weights, space.tops, total, row), row.uniform)
                     : draw(weights, space.sums, total, row.uniform);
}

// From scores that differ from the logits, or that are the logits.
template <class T>
Drawn draw_row(const T* scores, int64_t vocabulary, float peak, double total, const SamplingSpace& space,
               const SamplingRow& row) {
  if (row.temperature == 0) return {first_highest(scores, vocabulary), 1};
  return draw_warm(Weights<T>{scores, vocabulary, peak, 1.0f / float(row.temperature)}, space, total, row);
}

// The row with penalties and mask; its highest score.
template <class T>
float change(const T* logits, const SamplingRow& row, const SamplingInputs& inputs, int64_t at, int64_t vocabulary,
             const SamplingSpace& space) {
  for (int64_t i = 0; i < vocabulary; i += LANES)
    store(space.scores + i, load(logits + i, vocabulary - i), vocabulary - i);
  if (inputs.history)
    penalise(space.scores, inputs.history + at * inputs.history_length, inputs.history_length, inputs.prompts[at], row,
             vocabulary);
  if (inputs.mask) forbid(space.scores, vocabulary, inputs.mask + at * inputs.mask_words, inputs.mask_words);
  return find_tops(space.scores, vocabulary, space.tops);
}

template <class T>
void sample_row(const T* logits, const SamplingRow& row, const SamplingInputs& inputs, int64_t at, int64_t vocabulary,
                int64_t* token, float* log_prob, float* filtered) {
  SamplingSpace space(vocabulary);
  float raw_peak = find_tops(logits, vocabulary, space.tops), peak = raw_peak;
  bool is_changed = inputs.history || inputs.mask;
  Denominator raw = denominator_of(logits, vocabulary, space, !is_changed && row.temperature == 1);
  if (is_changed) peak = change(logits, row, inputs, at, vocabulary, space);
  Drawn drawn{-1, 1};
  if (std::isfinite(peak) && std::isfinite(raw.sum))
    drawn = is_changed ? draw_row(space.scores, vocabulary, peak, -1, space, row)
                       : draw_row(logits, vocabulary, peak, raw.sum, space, row);
  bool found = drawn.token >= 0;
  *token = found ? drawn.token : -1;
  *log_prob = found ? log_probability(widen(logits[drawn.token]), raw.log()) : NAN;
  *filtered = found ? float(std::log(drawn.share)) : NAN;
}

}  // namespace

template <class T>
void sample_tokens(const T* logits, const SamplingInputs& inputs, int64_t* tokens, float* log_probs, float* filtered,
                   int64_t rows, int64_t vocabulary) {
  parallel(rows, [&](int64_t i) {
    sample_row(logits + i * vocabulary, inputs.rows[i], inputs, i, vocabulary, tokens + i, log_probs + i, filtered + i);
  });
}

template void sample_tokens<float>(const float*, const SamplingInputs&, int64_t*, float*, float*, int64_t, int64_t);
template void sample_tokens<BFloat16>(const BFloat16*, const SamplingInputs&, int64_t*, float*, float*, int64_t,
                                      int64_t);

}  // namespace liaoyuan
