// The arithmetic of curves: round ticks, smoothing, numbers as text. Pure functions.

/** Round numbers within [low, high], about `count` of them. */
export function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((times) => times * power).find((size) => size >= rough * 0.8);
  const found = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9; place++) {
    found.push(Number((place * step).toPrecision(12)));
  }
  return found;
}

/** Powers of ten in [low, high], and 2 and 5 times them where there are few. */
export function logTicks(low, high) {
  const found = [];
  const factors = Math.log10(high / low) < 2 ? [1, 2, 5] : [1];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found.length > 7 ? found.filter((_, place) => place % Math.ceil(found.length / 6) === 0) : found;
}

/** The exponential mean of `values`, freed of the weight of its start; `weight` in [0, 1) of what came before. */
export function smoothed(values, weight) {
  let mean = 0;
  let left = 1;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    left *= weight;
    return mean / (1 - left);
  });
}

/** The place in sorted `values` that is nearest to `value`; -1 of none. */
export function nearest(values, value) {
  if (!values.length) return -1;
  let low = 0;
  let high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= value) low = middle;
    else high = middle;
  }
  return Math.abs(values[low] - value) <= Math.abs(values[high] - value) ? low : high;
}

/** The lowest and the highest of numbers, a little apart where they are one. */
export function bounds(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return [0, 1];
  if (low === high) return low === 0 ? [-1, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  return [low, high];
}

/** A number in few characters: 0.734, 12.3k, 1.2M, 3.1e-7; shares as percent. */
export function short(value, percent = false) {
  if (percent) return `${trim((100 * value).toFixed(1))}%`;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e9) return `${trim((value / 1e9).toFixed(2))}G`;
  if (size >= 1e6) return `${trim((value / 1e6).toFixed(2))}M`;
  if (size >= 1e4) return `${trim((value / 1e3).toFixed(1))}k`;
  if (size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  return trim(value.toFixed(Math.max(0, 3 - Math.floor(Math.log10(size)) - 1)));
}

function trim(text) {
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}
