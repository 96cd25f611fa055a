// The reverse chain in JavaScript: noise, update and loop, bit for bit those of noise.py, chain.py and cuda/step.h.
//
// A product or sum of two float32 numbers, computed in JavaScript's float64 and rounded once by Math.fround, is the float32
// result of IEEE; so is a square root. Whole numbers of 32 bits are multiplied by Math.imul.

const { fround, imul } = Math;

const bytes = new ArrayBuffer(4);
const asFloat = new Float32Array(bytes);
const asInt = new Int32Array(bytes);

/** What a draw is for: the chain's start, and a step of it. */
export const INITIAL = 0, STEP = 1;

// ---- noise ---------------------------------------------------------------------------------------------------------

/** The upper 32 bits of a·b, of whole numbers of 32 bits without a sign. */
function mulhi(a, b) {
  const aLow = a & 0xffff, aHigh = a >>> 16, bLow = b & 0xffff, bHigh = b >>> 16;
  const first = aHigh * bLow + Math.floor((aLow * bLow) / 65536);
  const second = aLow * bHigh + (first % 65536);
  return (aHigh * bHigh + Math.floor(first / 65536) + Math.floor(second / 65536)) >>> 0;
}

/** Philox4x32-10: ten rounds over the four words of `c`, in place, with the key (k0, k1). */
export function philox(c, k0, k1) {
  for (let round = 0; round < 10; round++) {
    const high0 = mulhi(0xd2511f53, c[0]), low0 = imul(0xd2511f53, c[0]);
    const high1 = mulhi(0xcd9e8d57, c[2]), low1 = imul(0xcd9e8d57, c[2]);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
}

const LN = [7.0376836292e-2, -1.151461031e-1, 1.167699874e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
  2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1].map(fround);
const LN2_HIGH = fround(0.693359375), LN2_LOW = fround(-2.1219444e-4);
// 0x1.921fb6p+0, −0x1.4abbcep−1, … of noise.py, in units of their last bit
const SIN = [0x1921fb6 * 2 ** -24, -0x14abbce * 2 ** -25, 0x1466bba * 2 ** -28, -0x132ca9e * 2 ** -32, 0x14bc85c * 2 ** -37];
const COS = [1, -0x13bd3cc * 2 ** -24, 0x103c1dc * 2 ** -26, -0x155c57a * 2 ** -30, 0x1d9c2e8 * 2 ** -35];

/** −2·ln u for u = (word + ½)/2³²: ln(1+f) = f − f²/2 + f³·P(f) on √½ ≤ 1+f < √2. */
function minusTwoLn(word) {
  const u = fround(fround(fround(word) * 2 ** -32) + 2 ** -33);
  asFloat[0] = u;
  const bits = asInt[0], exponent = (bits - 0x3f3504f3) >> 23;
  asInt[0] = bits - (exponent << 23);
  const f = fround(asFloat[0] - 1), square = fround(f * f);
  let y = LN[0];
  for (let i = 1; i < 9; i++) y = fround(fround(y * f) + LN[i]);
  y = fround(fround(y * f) * square);
  y = fround(y + fround(exponent * LN2_LOW));
  y = fround(y - fround(0.5 * square));
  return -2 * fround(fround(f + y) + fround(exponent * LN2_HIGH));
}

/** Elements 4·block … 4·block+3 of an image's noise, into `z` at `at`. */
function normal4(words, key, z, at) {
  philox(words, key[0], key[1]);
  for (let pair = 0; pair < 2; pair++) {
    const radius = fround(Math.sqrt(Math.max(minusTwoLn(words[2 * pair]), 0)));
    const word = words[2 * pair + 1], quadrant = ((word + 0x20000000) >>> 0) >>> 30;
    const x = fround(fround((word - (quadrant << 30)) | 0) * 2 ** -30), square = fround(x * x);
    let sin = SIN[4], cos = COS[4];
    for (let i = 3; i >= 0; i--) {
      sin = fround(fround(sin * square) + SIN[i]);
      cos = fround(fround(cos * square) + COS[i]);
    }
    sin = fround(sin * x);
    const odd = quadrant & 1;
    const turnedCos = odd ? sin : cos, turnedSin = odd ? cos : sin;
    z[at + 2 * pair] = fround(radius * ((quadrant + 1) & 2 ? -turnedCos : turnedCos));
    z[at + 2 * pair + 1] = fround(radius * (quadrant & 2 ? -turnedSin : turnedSin));
  }
}

/**
 * Draw from N(0, 1).
 * @param {bigint} seed 0…2⁶⁴−1
 * @param {number} image its index, 0…2³²−1
 * @param {number} t the timestep
 * @param {number} purpose INITIAL or STEP
 * @param {number} elements numbers of the image, C·H·W
 * @returns {Float32Array}
 */
export function normal(seed, image, t, purpose, elements) {
  const key = [Number(seed & 0xffffffffn), Number(seed >> 32n)];
  const blocks = Math.ceil(elements / 4), z = new Float32Array(4 * blocks), words = new Uint32Array(4);
  for (let block = 0; block < blocks; block++) {
    words[0] = block;
    words[1] = image;
    words[2] = t;
    words[3] = purpose << 24;
    normal4(words, key, z, 4 * block);
  }
  return z.subarray(0, elements);
}

// ---- update --------------------------------------------------------------------------------------------------------

const EXP = [1.98756915e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1].map(fround);
const LOG2_E = fround(1.44269504), ROUND = 1.5 * 2 ** 23;

/** eˣ, x clamped to −87…88: x = k·ln 2 + r, and eˣ = 2ᵏ·(1 + r + r²·P(r)). */
export function exp(x) {
  x = x > 88 ? 88 : x < -87 ? -87 : x;
  const rounded = fround(fround(x * LOG2_E) + ROUND), k = fround(rounded - ROUND);
  let r = fround(x - fround(k * LN2_HIGH));
  r = fround(r - fround(k * LN2_LOW));
  let y = EXP[0];
  for (let i = 1; i < 6; i++) y = fround(fround(y * r) + EXP[i]);
  y = fround(fround(fround(y * fround(r * r)) + r) + 1);
  asFloat[0] = rounded;
  asInt[0] = (asInt[0] + 127) << 23; // 2ᵏ
  return fround(y * asFloat[0]);
}

/** Levels 0…255 of numbers in −1…1, as floor(127.5·x + 128). */
export function uint8(x) {
  const scaled = fround(fround(x * 127.5) + 128);
  return scaled >= 255 ? 255 : scaled > 0 ? Math.floor(scaled) : 0;
}

/** A base64 text of the file as float32 or int32. */
export function unpack(text, Kind) {
  const found = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Kind(found.buffer);
}

// ---- the chain -----------------------------------------------------------------------------------------------------

/**
 * Run a chain for some images, one step at a time.
 *
 * @param {object} model what model.json holds
 * @param {(inputs: object, n: number) => Promise<{out: Float32Array, var?: Float32Array}>} network answers to
 *   {x, t, y?, x0_prev?}, typed arrays of n images
 * @param {object} request steps (a key of model.chains), seed (bigint), images (their indices), labels (the class of each,
 *   or absent), guidance (w, 1 by default), towards (another seed, bigint, or absent) and share (λ, how much of that)
 * @yields {{t: number, step: number, steps: number, x: Float32Array, x0: Float32Array}} the state after each step, and x̂_0;
 *   after the last one both are the images
 */
export async function* run(model, network, { steps, seed, images, labels, guidance = 1, towards, share = 0 }) {
  const chain = model.chains[steps];
  const times = unpack(chain.timesteps, Int32Array), rows = unpack(chain.rows, Float32Array);
  const learned = chain.learned ? unpack(chain.learned, Float32Array) : null;
  const memory = chain.memory ? unpack(chain.memory, Float32Array) : null;
  const { shape, clip, classes, self_condition: selfCondition } = model.spec;
  const size = shape[0] * shape[1] * shape[2], n = images.length, limit = clip === null ? Infinity : fround(clip);
  const w = fround(guidance), twice = labels && guidance !== 1 && guidance !== 0, calls = twice ? 2 * n : n;
  const x = new Float32Array(n * size), x0 = new Float32Array(n * size);
  images.forEach((image, i) => x.set(initial(seed, towards, share, image, size), i * size));
  const inputs = { x: new Float32Array(calls * size), t: new Int32Array(calls) };
  if (selfCondition) inputs.x0_prev = new Float32Array(calls * size);
  if (classes !== null) {
    const none = labels && guidance !== 0 ? labels : new Array(n).fill(classes);
    inputs.y = Int32Array.from(twice ? [...labels, ...new Array(n).fill(classes)] : none);
  }
  let earlier = [];
  for (let step = 0; step < times.length; step++) {
    const t = times[step], [p, q, a, b, sigma] = rows.subarray(5 * step, 5 * step + 5);
    inputs.t.fill(t);
    for (let start = 0; start < inputs.x.length; start += x.length) {
      inputs.x.set(x, start);
      if (selfCondition) inputs.x0_prev.set(x0, start);
    }
    const answer = await network(inputs, calls);
    const out = twice ? guided(answer.out, x.length, w) : answer.out, variance = answer.var; // that of the class
    if (!out.every(Number.isFinite)) throw new Error(`the network's output at t = ${t} is not finite`);
    for (let i = 0; i < n; i++) {
      const z = sigma !== 0 ? normal(seed, images[i], t, STEP, size) : null;
      for (let j = 0; j < size; j++) {
        const at = i * size + j, of = x[at];
        let estimate = fround(fround(p * of) + fround(q * out[at]));
        estimate = estimate > limit ? limit : estimate < -limit ? -limit : estimate;
        let next = fround(fround(a * estimate) + fround(b * of));
        for (let k = 0; memory && k < earlier.length; k++) {
          const weight = memory[2 * step + k];
          if (weight !== 0) next = fround(next + fround(weight * earlier[k][at]));
        }
        if (z) {
          const s = learned ? exp(fround(learned[2 * step] + fround(learned[2 * step + 1] * variance[at]))) : sigma;
          next = fround(next + fround(s * z[j]));
        }
        x[at] = next;
        x0[at] = estimate;
      }
    }
    if (memory) earlier = [x0.slice(), ...earlier.slice(0, 1)];
    yield { t, step: step + 1, steps: times.length, x, x0 };
  }
}

/** x_T of an image; or between those of two seeds, ((1−λ)·x_T + λ·x'_T) / √((1−λ)² + λ²), which is N(0, I) as well. */
function initial(seed, towards, share, image, size) {
  const x = normal(seed, image, 0, INITIAL, size);
  if (towards === undefined) return x;
  const other = normal(towards, image, 0, INITIAL, size), length = Math.sqrt((1 - share) * (1 - share) + share * share);
  const mine = fround((1 - share) / length), theirs = fround(share / length);
  return x.map((value, i) => fround(fround(mine * value) + fround(theirs * other[i])));
}

/** out_∅ + w·(out_y − out_∅), of a batch that has every image with its class and then without. */
function guided(out, length, w) {
  const together = new Float32Array(length);
  for (let i = 0; i < length; i++) {
    together[i] = fround(out[length + i] + fround(w * fround(out[i] - out[length + i])));
  }
  return together;
}

/** One image of the chain's numbers [C, H, W] as RGBA levels [H, W, 4]. */
export function pixels(values, shape) {
  const [channels, height, width] = shape, area = height * width, levels = new Uint8ClampedArray(4 * area);
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) levels[4 * i + c] = uint8(values[channels >= 3 ? c * area + i : i]);
    levels[4 * i + 3] = channels === 4 ? uint8(values[3 * area + i]) : 255;
  }
  return levels;
}
