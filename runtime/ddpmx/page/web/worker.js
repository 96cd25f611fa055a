// Runs the network and the chain beside the page, so that the page answers meanwhile.

import { pixels, run } from "./chain.js";

const AT_ONCE = 16;
const MODULES = { wasm: "ort.wasm.min.mjs", webgpu: "ort.webgpu.min.mjs" };

let model, ort, session, provider, cancelled;

self.onmessage = async ({ data }) => {
  if (data.kind === "cancel") {
    cancelled = true;
    return;
  }
  try {
    if (data.kind === "open") await open();
    else await draw(data);
  } catch (error) {
    self.postMessage({ kind: "fault", text: error instanceof Error ? error.message : String(error) });
  }
};

/** A file of the site, with how much of it is there on the way. */
async function load(name, bytes) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} is not there (${response.status})`);
  const whole = new Uint8Array(bytes), reader = response.body.getReader();
  let at = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (at + part.value.length > bytes) throw new Error(`${name} is larger than model.json says`);
    whole.set(part.value, at);
    at += part.value.length;
    self.postMessage({ kind: "loading", share: at / bytes });
  }
  if (at !== bytes) throw new Error(`${name} ends too early: ${at} of ${bytes} bytes`);
  return whole;
}

async function open() {
  model = await (await fetch("model.json")).json();
  self.postMessage({ kind: "model", model });
  await start("wasm");
  const threads = ort.env.wasm.numThreads;
  self.postMessage({ kind: "ready", text: `Ready: ONNX Runtime on the CPU, ${threads} thread${threads > 1 ? "s" : ""}.` });
}

/** The network on "wasm" or "webgpu". */
async function start(wanted) {
  if (provider === wanted) return;
  const place = new URL(model.ort, self.location.href).href;
  ort = await import(place + MODULES[wanted]);
  ort.env.wasm.wasmPaths = place;
  // threads share memory, which browsers allow only where the server, or sw.js in its place, isolates the page
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  provider = undefined;
  await session?.release();
  session = await ort.InferenceSession.create(await load("model.onnx", model.bytes), {
    executionProviders: wanted === "webgpu" ? ["webgpu", "wasm"] : ["wasm"],
  });
  provider = wanted;
}

async function network(inputs, n) {
  const dims = [n, ...model.spec.shape], feeds = {};
  for (const [name, values] of Object.entries(inputs)) {
    const whole = values instanceof Int32Array;
    feeds[name] = new ort.Tensor(whole ? "int32" : "float32", values, whole ? [n] : dims);
  }
  const answer = await session.run(feeds);
  return { out: answer[model.spec.prediction].data, var: answer.var?.data };
}

async function draw(request) {
  cancelled = false;
  await start(request.provider);
  const { shape } = model.spec, size = shape[0] * shape[1] * shape[2], begun = performance.now();
  const seeds = { seed: BigInt(request.seed), towards: request.towards === undefined ? undefined : BigInt(request.towards) };
  for (let first = 0; first < request.n; first += AT_ONCE) {
    const n = Math.min(AT_ONCE, request.n - first), images = Array.from({ length: n }, (_, i) => first + i);
    const labels = request.labels?.slice(first, first + n);
    for await (const state of run(model, network, { ...request, ...seeds, images, labels })) {
      const last = state.step === state.steps, shown = last ? state.x : state.x0;
      const drawn = images.map((_, i) => pixels(shown.subarray(i * size, (i + 1) * size), shape));
      const share = (first + (n * state.step) / state.steps) / request.n;
      self.postMessage({ kind: "step", first, drawn, share, t: state.t }, drawn.map((each) => each.buffer));
      await new Promise((resume) => setTimeout(resume)); // a message to cancel is heard here
      if (cancelled) {
        self.postMessage({ kind: "cancelled" });
        return;
      }
    }
  }
  self.postMessage({ kind: "drawn", seconds: (performance.now() - begun) / 1000 });
}
