// The page's form and its field of images; worker.js does the work.

const at = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
const MOST = 2n ** 64n - 1n;

let model, busy = false, asked, condition;

function say(text) {
  at("status").textContent = text;
}

function setBusy(value) {
  busy = value;
  at("draw").disabled = at("other").disabled = busy;
  at("cancel").disabled = !busy;
}

function choices(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

function describe(found) {
  model = found;
  const { spec } = model, [channels, height, width] = spec.shape;
  document.title = `${model.name} – ddpmx`;
  at("name").textContent = model.name;
  if (model.about) at("about").textContent = model.about;
  at("facts").textContent = `${height}×${width}×${channels}, T = ${spec.timesteps}, ${spec.precision}, ${(model.bytes / 1e6).toFixed(1)} MB, `
    + `sha256 ${model.sha256.slice(0, 12)}…`;
  const steps = Object.entries(model.chains).map(([count, chain]) => [count, `${count} (${chain.sampler})`]);
  choices(at("steps"), steps, String(model.steps));
  at("class-of").hidden = spec.classes === null;
  if (spec.classes !== null) {
    const named = Array.from({ length: spec.classes }, (_, i) => [String(i), spec.class_names[i] ?? String(i)]);
    choices(at("label"), [["turns", "each in turn"], ...(spec.null_class ? [["none", "none"]] : []), ...named], "turns");
  }
  at("guidance-of").hidden = !spec.null_class;
  at("cond-of").hidden = spec.condition === null;
  restore();
  pick();
  // without it, and where a server draws, the page is there online only
  if (model.ort && "serviceWorker" in navigator) navigator.serviceWorker.register("sw.js").catch(() => {});
}

/** WebGPU, where the page has it, the browser has it, and the GPU has half precision if the model is in it. */
async function offerGpu() {
  const adapter = model.webgpu ? await navigator.gpu?.requestAdapter() : null;
  at("provider-of").hidden = !adapter || (model.spec.precision !== "fp32" && !adapter.features.has("shader-f16"));
}

/** The choices stand in the address, so that it can be passed on. */
function restore() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of wanted) {
    const field = at("request").elements[name];
    if (field && (field.tagName !== "SELECT" || [...field.options].some((option) => option.value === value))) field.value = value;
  }
}

/** Guidance needs a class, and a way between two seeds the other one. */
function pick() {
  at("guidance").disabled = at("label").value === "none";
  at("w").textContent = at("guidance").value;
  at("share-of").hidden = !at("towards").value.trim();
  at("lambda").textContent = at("share").value;
}

/** Whether a field holds a seed; says so if not. */
function isSeed(field) {
  const text = field.value.trim(), good = /^[0-9]{1,20}$/.test(text) && BigInt(text) <= MOST;
  field.setAttribute("aria-invalid", String(!good));
  if (!good) at("fault").textContent = `The seed must be a whole number from 0 to ${MOST}.`;
  return good;
}

function labels(n) {
  const { classes } = model.spec, chosen = at("label").value;
  if (classes === null || chosen === "none") return undefined;
  return Array.from({ length: n }, (_, i) => (chosen === "turns" ? i % classes : Number(chosen)));
}

function draw() {
  at("fault").textContent = "";
  const seed = at("seed").value.trim(), towards = at("towards").value.trim() || undefined, n = Number(at("n").value);
  at("towards").setAttribute("aria-invalid", "false");
  const good = isSeed(at("seed")) && (towards === undefined || isSeed(at("towards")));
  if (!good || busy || !model) return;
  if (model.spec.condition !== null && !condition) {
    at("fault").textContent = "This model needs a picture as its condition.";
    return;
  }
  const of = labels(n), guided = model.spec.null_class && of ? Number(at("guidance").value) : 1;
  asked = {
    kind: "draw", seed, n, steps: at("steps").value, labels: of, guidance: guided, provider: at("provider").value,
    towards, share: Number(at("share").value), condition,
  };
  history.replaceState(null, "", `#${new URLSearchParams(new FormData(at("request")))}`);
  const [, height, width] = model.spec.shape, columns = Math.ceil(Math.sqrt(n));
  at("field").style.gridTemplateColumns = `repeat(${columns}, 1fr)`;
  at("field").replaceChildren(...Array.from({ length: n }, () => Object.assign(document.createElement("canvas"), { width, height })));
  at("field").setAttribute("aria-label", `${n} images of seed ${seed}, on their way`);
  at("save").disabled = true;
  at("done").value = 0;
  say("Drawing …");
  setBusy(true);
  worker.postMessage(asked);
}

function show({ first, drawn, share, t }) {
  const [, height, width] = model.spec.shape, canvases = at("field").children;
  drawn.forEach((levels, i) => canvases[first + i].getContext("2d").putImageData(new ImageData(levels, width, height), 0, 0));
  at("done").value = share;
  at("done").title = `t = ${t}`;
}

function finish(text, whole) {
  setBusy(false);
  say(text);
  at("save").disabled = !whole;
  if (asked) at("field").setAttribute("aria-label", `${asked.n} images of seed ${asked.seed}${whole ? "" : ", not finished"}`);
}

/** A file as base64. */
function asBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** All images on one sheet, pixel by pixel. */
function save() {
  const canvases = [...at("field").children], columns = Math.ceil(Math.sqrt(canvases.length));
  const { width, height } = canvases[0], sheet = document.createElement("canvas");
  sheet.width = columns * width;
  sheet.height = Math.ceil(canvases.length / columns) * height;
  canvases.forEach((each, i) => sheet.getContext("2d").drawImage(each, (i % columns) * width, Math.floor(i / columns) * height));
  sheet.toBlob((blob) => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `${model.name}-${asked.seed}.png` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}

worker.onmessage = ({ data }) => {
  if (data.kind === "model") describe(data.model);
  else if (data.kind === "loading") at("done").value = data.share;
  else if (data.kind === "ready") {
    offerGpu();
    finish(data.text, false);
    at("done").value = 0;
  } else if (data.kind === "step") show(data);
  else if (data.kind === "drawn") finish(`${asked.n} image${asked.n > 1 ? "s" : ""} in ${data.seconds.toFixed(1)} s.`, true);
  else if (data.kind === "cancelled") finish("Cancelled.", false);
  else if (data.kind === "fault") {
    at("fault").textContent = data.text;
    finish("It did not work.", false);
  }
};
worker.onerror = (event) => {
  at("fault").textContent = event.message || "worker.js could not be loaded";
  finish("It did not work.", false);
};

at("request").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
at("request").addEventListener("input", pick);
// to let go of the slider draws: what is between two seeds is looked for by eye
at("share").addEventListener("change", () => busy || draw());
at("cond").addEventListener("change", async () => {
  const [file] = at("cond").files;
  condition = file && (await asBase64(file));
});
at("cancel").addEventListener("click", () => worker.postMessage({ kind: "cancel" }));
at("save").addEventListener("click", save);
at("other").addEventListener("click", () => {
  at("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
  draw();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && busy) worker.postMessage({ kind: "cancel" });
});
worker.postMessage({ kind: "open" });
