// Posts the picture as a job, follows its events, and shows the result beside what was sent.

const at = (id) => document.getElementById(id);
const ZOOMS = [0.125, 0.25, 0.5, 1, 2, 4, 8];
const KEY = "sr-serve-key";
const RETRIES = 60; // once a second

// What the server says no to; trying again is of no use.
class Refusal extends Error {}

let picture = null; // the File that was chosen
let work = null; // {controller, job} of the picture under way
let models = []; // of the server
let zoom = null; // screen pixels for each pixel of the result; null fits it in

// --- choosing ---------------------------------------------------------------------------------------------------

function choose(file) {
  picture = file;
  at("chosen").textContent = `${file.name || "a pasted picture"} (${megabytes(file.size)})`;
  at("file").required = false;
  tell("");
}

const megabytes = (bytes) => (bytes < 1e5 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

at("file").addEventListener("change", (event) => {
  if (event.target.files[0]) choose(event.target.files[0]);
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
  });
}
document.addEventListener("drop", (event) => {
  if (event.dataTransfer.files[0]) choose(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files[0]) choose(event.clipboardData.files[0]);
});

// --- the server -------------------------------------------------------------------------------------------------

const headers = () => (at("key").value ? { Authorization: `Bearer ${at("key").value}` } : {});

async function ask(url, options = {}) {
  let answer;
  try {
    answer = await fetch(url, { ...options, headers: headers() });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer.");
  }
  if (!answer.ok) throw refusal(answer.status, await answer.text());
  return answer;
}

function refusal(status, text) {
  if (status === 401) at("key-label").hidden = false;
  try {
    const { detail } = JSON.parse(text);
    return new Refusal(typeof detail === "string" ? detail : detail.map((part) => part.msg).join("; "));
  } catch {
    return new Refusal(`The server answered ${status}.`);
  }
}

// fetch does not tell how much has been sent.
function post(url, file, signal, sent) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", url);
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => sent(event.total ? event.loaded / event.total : 1);
    request.onload = () =>
      request.status === 202
        ? resolve(JSON.parse(request.responseText))
        : reject(refusal(request.status, request.responseText));
    request.onerror = () => reject(new Error("The server does not answer, or has refused the picture."));
    signal.addEventListener("abort", () => {
      request.abort();
      reject(new DOMException("cancelled", "AbortError"));
    });
    request.send(file);
  });
}

// Not EventSource, which cannot send a key.
async function* events(url, signal) {
  const reader = (await ask(url, { signal })).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.match(/^data: (.*)$/m); // others only tell that the server is there
      if (data) yield JSON.parse(data[1]);
    }
  }
}

// The connection may break, and the server be another one: the job goes on.
async function finished(job, signal) {
  let lost = 0;
  for (;;) {
    try {
      for await (const state of events(`v1/jobs/${job}/events`, signal)) {
        lost = 0;
        if (state.state === "done") return;
        if (state.state === "failed") throw new Refusal(sentence(state.error));
        if (state.state === undefined) throw new Refusal(sentence(state.detail));
        if (state.state === "queued") show("Waiting for its turn…");
        else show("Enlarging…", state.progress);
      }
    } catch (error) {
      if (error instanceof Refusal || error.name === "AbortError" || ++lost > RETRIES) throw error;
      show("Waiting for the server…");
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + ".";

// --- one picture ------------------------------------------------------------------------------------------------

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (work || !picture) return;
  const sent = picture;
  const controller = new AbortController();
  work = { controller, job: null };
  at("work").hidden = false;
  at("start").disabled = true;
  at("error").textContent = "";
  try {
    const query = new URLSearchParams({ model: at("model").value, format: at("format").value });
    if (at("factor").value) query.set("factor", at("factor").value);
    show("Sending…", 0);
    const accepted = await post(`v1/jobs?${query}`, sent, controller.signal, (share) => show("Sending…", share));
    sessionStorage.setItem(KEY, at("key").value);
    work.job = accepted.id;
    await finished(accepted.id, controller.signal);
    const result = await (await ask(`v1/jobs/${accepted.id}/result`, { signal: controller.signal })).blob();
    await compare(sent, result, at("format").value);
    tell("Done.");
  } catch (error) {
    tell("");
    if (error.name === "AbortError") tell("Cancelled.");
    else at("error").textContent = error.message;
  } finally {
    forget();
    work = null;
    at("work").hidden = true;
    at("start").disabled = false;
  }
});

at("cancel").addEventListener("click", () => work?.controller.abort());
window.addEventListener("pagehide", (event) => event.persisted || forget());

// The result is in the page, or nobody wants it.
function forget() {
  if (work?.job) fetch(`v1/jobs/${work.job}`, { method: "DELETE", headers: headers(), keepalive: true });
}

function show(text, share) {
  tell(text);
  if (share === undefined) at("progress").removeAttribute("value");
  else at("progress").value = share;
  at("share").textContent = share === undefined ? "" : `${Math.round(100 * share)} %`;
}

function tell(text) {
  if (at("status").textContent !== text) at("status").textContent = text;
}

// --- before and after -------------------------------------------------------------------------------------------

const sizeOf = (image) => `${image.naturalWidth} × ${image.naturalHeight}`;

async function load(image, blob) {
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
  try {
    await image.decode();
    return true;
  } catch {
    return false; // a format that this browser does not show
  }
}

async function compare(sent, result, format) {
  const seen = await load(at("before"), sent);
  const shown = await load(at("after"), result);
  at("download").href = at("after").src;
  at("download").download = `${(sent.name || "picture").replace(/\.[^.]*$/, "")}-enlarged.${format}`;
  at("result").hidden = false;
  at("frame").hidden = !shown;
  at("frame").classList.toggle("alone", !seen);
  document.querySelector(".zoom").hidden = !shown;
  document.querySelector(".split").hidden = !(shown && seen);
  at("sizes").textContent = shown
    ? `${seen ? `${sizeOf(at("before"))} → ` : ""}${sizeOf(at("after"))}, ${megabytes(result.size)}`
    : `${megabytes(result.size)}; this browser does not show ${format.toUpperCase()}`;
  at("after").alt = `After: ${sizeOf(at("after"))} pixels`;
  at("before").alt = `Before: ${sizeOf(at("before"))} pixels`;
  zoom = null;
  layOut();
  split(50);
  at("download").focus();
}

function layOut() {
  const { naturalWidth: width, naturalHeight: height } = at("after");
  const view = at("view");
  const fit = Math.min(1, view.clientWidth / width, (0.75 * window.innerHeight) / height);
  const scale = zoom ?? fit;
  const middle = [
    (view.scrollLeft + view.clientWidth / 2) / (at("pictures").offsetWidth || 1),
    (view.scrollTop + view.clientHeight / 2) / (at("pictures").offsetHeight || 1),
  ];
  at("pictures").style.width = `${width * scale}px`;
  at("pictures").style.height = `${height * scale}px`;
  view.scrollLeft = middle[0] * width * scale - view.clientWidth / 2;
  view.scrollTop = middle[1] * height * scale - view.clientHeight / 2;
  at("zoom").textContent = `${Math.round(100 * scale)} %`;
  return scale;
}

function zoomBy(step) {
  const now = layOut();
  const next = step > 0 ? ZOOMS.find((level) => level > now * 1.01) : ZOOMS.findLast((level) => level < now * 0.99);
  if (next) {
    zoom = next;
    layOut();
  }
}

at("zoom-in").addEventListener("click", () => zoomBy(1));
at("zoom-out").addEventListener("click", () => zoomBy(-1));
at("zoom-fit").addEventListener("click", () => {
  zoom = null;
  layOut();
});
at("view").addEventListener("keydown", (event) => {
  if (event.key === "+" || event.key === "=") zoomBy(1);
  if (event.key === "-") zoomBy(-1);
});
at("view").addEventListener(
  "wheel",
  (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoomBy(-event.deltaY);
  },
  { passive: false },
);
window.addEventListener("resize", () => at("result").hidden || layOut());

function split(percent) {
  const share = Math.min(100, Math.max(0, percent));
  at("pictures").style.setProperty("--split", `${share}%`);
  at("split").value = share;
  at("split").setAttribute("aria-valuetext", `${Math.round(share)} % before, ${Math.round(100 - share)} % after`);
}

at("split").addEventListener("input", (event) => split(Number(event.target.value)));

function drag(element, move) {
  element.addEventListener("pointerdown", (start) => {
    if (start.button !== 0) return;
    start.preventDefault();
    start.stopPropagation();
    element.setPointerCapture(start.pointerId);
    const step = (event) => move(event, start);
    element.addEventListener("pointermove", step);
    for (const end of ["pointerup", "pointercancel"]) {
      element.addEventListener(end, () => element.removeEventListener("pointermove", step), { once: true });
    }
  });
}

drag(at("divider"), (event) => {
  const { left, width } = at("pictures").getBoundingClientRect();
  split((100 * (event.clientX - left)) / width);
});
// Fingers scroll by themselves.
at("pictures").addEventListener("pointerdown", (start) => {
  if (start.pointerType !== "mouse" || start.button !== 0) return;
  start.preventDefault();
  at("view").focus();
  const view = at("view");
  const from = [view.scrollLeft + start.clientX, view.scrollTop + start.clientY];
  const pan = (event) => view.scrollTo(from[0] - event.clientX, from[1] - event.clientY);
  at("pictures").classList.add("moving");
  window.addEventListener("pointermove", pan);
  window.addEventListener(
    "pointerup",
    () => {
      window.removeEventListener("pointermove", pan);
      at("pictures").classList.remove("moving");
    },
    { once: true },
  );
});

// --- the models -------------------------------------------------------------------------------------------------

async function listModels() {
  models = await (await ask("v1/models")).json();
  at("model").replaceChildren(...models.map(({ name, scale }) => new Option(`${name} (×${scale})`, name)));
  at("notice").textContent = models[0].notice;
  showModel();
  at("error").textContent = "";
}

function showModel() {
  const { scale, summary } = models.find(({ name }) => name === at("model").value);
  at("summary").textContent = summary;
  // Factor 1 is for models that keep the size: others would give the picture back as it is.
  const keeps = scale === 1;
  at("same").hidden = at("same").disabled = !keeps;
  if (!keeps && at("factor").value === "1") at("factor").value = "";
}

at("model").addEventListener("change", showModel);
at("key").value = sessionStorage.getItem(KEY) ?? "";
at("key").addEventListener("change", () => listModels().catch((error) => (at("error").textContent = error.message)));
listModels().catch((error) => (at("error").textContent = error.message));
