// The next token of every row: penalties, grammar mask, temperature, top-k, top-p, min-p and the draw, row by row.
//
// A row of logits is read from memory once and worked on in the caches. Filters leave the best so many tokens, so only
// candidates near the peak are sorted, and more of them if these do not suffice. Sums run over chunks of 64 in fp32,
// then in fp64; a row's bits depend on that row alone.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"

namespace liaoyuan {

namespace {

constexpr int64_t CHUNK = 64;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
// Least weights of candidates, against the peak's, one after the other until they suffice.
constexpr float CANDIDATES[] = {0x1p-2f, 0x1p-4f, 0x1p-7f, 0x1p-14f, 0x1p-24f, 0.0f};

struct Candidate {
  float weight;
  int32_t token;
};
bool is_before(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

struct Drawn {
  int64_t token;
  double share;  // of what the filters left
};

// scores [padded] = the logits in fp32, nothing past the end; returns the highest.
template <class T>
float read_row(const T* logits, int64_t vocabulary, int64_t padded, float* scores) {
  Vec best = splat(NOTHING);
  const IntVec lane = lane_numbers();
  for (int64_t i = 0; i < padded; i += LANES) {
    Vec v = splat(NOTHING);
    if (i + LANES <= vocabulary)
      v = load(logits + i);
    else if (i < vocabulary)
      v = choose(lane < int32_t(vocabulary - i), load(logits + i, vocabulary - i), v);
    best = maximum(v, best);
    store(scores + i, v);
  }
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

void forbid(float* scores, const uint32_t* bits, int64_t padded, int64_t words) {
  IntVec bit{};
  int32_t powers[LANES];
  for (int i = 0; i < LANES; ++i) powers[i] = 1 << i;
  read(powers, bit);
  for (int64_t i = 0; i < padded; i += LANES) {
    uint32_t word = i / 32 < words ? bits[i / 32] >> (i % 32) & 0xffffu : 0;
    IntVec allowed = (bit & int32_t(word)) != IntVec{};
    store(scores + i, choose(allowed, load(scores + i), splat(NOTHING)));
  }
}

int64_t first_highest(const float* scores, int64_t padded) {
  Vec best = splat(NOTHING);
  IntVec place{}, lane = lane_numbers();
  for (int64_t i = 0; i < padded; i += LANES) {
    Vec v = load(scores + i);
    auto higher = v > best;
    place = (IntVec)choose(higher, (Vec)(lane + int32_t(i)), (Vec)place);
    best = choose(higher, v, best);
  }
  int64_t found = 0;
  for (int i = 0; i < LANES; ++i)
    if (i == 0 || best[i] > best[found] || (best[i] == best[found] && place[i] < place[found])) found = i;
  return place[found];
}

// weights = exp((scores - peak) / temperature), sums: of its chunks; returns the total.
double weigh(const float* scores, float peak, float temperature, int64_t padded, float* weights, float* sums) {
  double total = 0;
  float inverse = 1.0f / temperature;
  for (int64_t i = 0; i < padded; i += CHUNK) {
    Vec part{};
    for (int64_t j = i; j < i + CHUNK; j += LANES) {
      Vec weight = exponential((load(scores + j) - peak) * inverse);
      store(weights + j, weight);
      part += weight;
    }
    sums[i / CHUNK] = sum(part);
    total += sums[i / CHUNK];
  }
  return total;
}

// The first token whose running sum exceeds goal.
Drawn draw(const float* weights, const float* sums, double total, double uniform, int64_t padded) {
  double goal = uniform * total, sum = 0;
  int64_t chunk = 0, last = 0;
  for (int64_t i = 0; i < padded / CHUNK; ++i) {
    if (sums[i] > 0) last = i;
    if (sum + sums[i] > goal) break;
    sum += sums[i];
    chunk = i + 1;
  }
  chunk = std::min(chunk, last);
  int64_t token = -1;
  for (int64_t i = chunk * CHUNK; i < (chunk + 1) * CHUNK; ++i) {
    if (weights[i] > 0) token = i;  // rounding may leave the goal above the chunk: then its last token
    sum += weights[i];
    if (sum > goal && token >= 0) break;
  }
  return {token, token < 0 ? 0 : weights[token] / total};
}

// In the order of the vocabulary.
std::vector<Candidate> candidates(const float* weights, const float* sums, int64_t padded, float least) {
  std::vector<Candidate> found;
  for (int64_t i = 0; i < padded; i += CHUNK) {
    if (sums[i / CHUNK] < least || sums[i / CHUNK] == 0) continue;
    for (int64_t j = i; j < i + CHUNK; ++j)
      if (weights[j] >= least && weights[j] > 0) found.push_back({weights[j], int32_t(j)});
  }
  return found;
}

double mass_of(const std::vector<Candidate>& candidates) {
  double mass = 0;
  for (const Candidate& one : candidates) mass += one.weight;
  return mass;
}

// What the filters leave of all tokens, from the best on.
void filter(std::vector<Candidate>& found, const SamplingRow& row, double total) {
  if (row.top_k > 0 && double(found.size()) > row.top_k) {
    std::nth_element(found.begin(), found.begin() + int64_t(row.top_k), found.end(), is_before);
    found.resize(size_t(row.top_k));
  }
  std::sort(found.begin(), found.end(), is_before);
  size_t count = found.size();
  if (row.top_p < 1) {
    double goal = row.top_p * (row.top_k > 0 ? mass_of(found) : total), mass = 0;
    size_t i = 0;
    for (; i < count && (i == 0 || mass < goal); ++i) mass += found[i].weight;
    count = i;
  }
  while (count > 1 && found[count - 1].weight < row.min_p * found[0].weight) --count;
  found.resize(count);
}

std::vector<Candidate> left_by_filters(const float* weights, const float* sums, double total, const SamplingRow& row,
                                       int64_t padded) {
  // What min_p drops counts for top_p; without that it need not be looked at.
  float floor = row.top_p >= 1 && row.min_p > 0 ? float(row.min_p) * 0.999f : 0;
  for (float least : CANDIDATES) {
    bool is_enough = least <= floor || (row.top_k == 0 && row.min_p >= least);
    std::vector<Candidate> found = candidates(weights, sums, padded, std::max(least, floor));
    is_enough = is_enough || (row.top_k > 0 ? double(found.size()) >= row.top_k
                                            : row.top_p < 1 && mass_of(found) > row.top_p * total);
    if (!is_enough) continue;
    filter(found, row, total);
    return found;
  }
  return {};
}

Drawn draw_filtered(const std::vector<Candidate>& left, double uniform) {
  double total = mass_of(left), sum = 0;
  for (size_t i = 0; i < left.size(); ++i)
    if ((sum += left[i].weight) > uniform * total || i + 1 == left.size())
      return {left[i].token, left[i].weight / total};
  return {-1, 0};
}

template <class T>
void sample_row(const T* logits, const SamplingRow& row, const SamplingInputs& inputs, int64_t at, int64_t vocabulary,
                int64_t* token, float* log_prob, float* filtered) {
  int64_t padded = (vocabulary + CHUNK - 1) / CHUNK * CHUNK;
  float* scores = static_cast<float*>(scratch(0, size_t(2 * padded + padded / CHUNK) * sizeof(float)));
  float *weights = scores + padded, *sums = weights + padded;
  float raw_peak = read_row(logits, vocabulary, padded, scores), peak = raw_peak;
  double raw_total = weigh(scores, raw_peak, 1.0f, padded, weights, sums), total = raw_total;
  bool is_changed = inputs.history || inputs.mask;
  if (inputs.history)
    penalise(scores, inputs.history + at * inputs.history_length, inputs.history_length, inputs.prompts[at], row,
             vocabulary);
  if (inputs.mask) forbid(scores, inputs.mask + at * inputs.mask_words, padded, inputs.mask_words);
  int64_t best = is_changed || row.temperature == 0 ? first_highest(scores, padded) : -1;
  if (is_changed) peak = scores[best];
  Drawn drawn{best, 1};
  bool is_usable = std::isfinite(peak) && std::isfinite(raw_total);
  if (row.temperature > 0 && is_usable) {
    if (is_changed || row.temperature != 1)
      total = weigh(scores, peak, float(row.temperature), padded, weights, sums);
    bool is_filtered = row.top_k > 0 || row.top_p < 1 || row.min_p > 0;
    drawn = is_filtered ? draw_filtered(left_by_filters(weights, sums, total, row, padded), row.uniform)
                        : draw(weights, sums, total, row.uniform, padded);
  }
  bool found = is_usable && drawn.token >= 0;
  *token = found ? drawn.token : -1;
  *log_prob = found ? float(widen(logits[drawn.token]) - raw_peak - std::log(raw_total)) : NAN;
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
