// Keeps the site's files, so that it works offline once it was loaded, and isolates the page, so that threads are allowed.

const NAME = "ddpmx-" + "VERSION";
const FILES = [/* FILES */];

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(NAME).then((cache) => cache.addAll(["./", ...FILES])).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => {
  const mine = new URL("./", self.location.href).pathname;
  event.waitUntil((async () => {
    for (const name of await caches.keys()) {
      if (!name.startsWith("ddpmx-") || name === NAME) continue;
      const [request] = await (await caches.open(name)).keys(); // other pages of this host have caches of their own
      if (!request || new URL(request.url).pathname.startsWith(mine)) await caches.delete(name);
    }
    await self.clients.claim();
  })());
});

self.addEventListener("fetch", (event) => {
  if (event.request.method === "GET") event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open(NAME);
  let found = await cache.match(request, { ignoreSearch: true });
  if (!found) {
    found = await fetch(request);
    if (found.ok && /\/ort[-.][^/]*$/.test(request.url)) await cache.put(request, found.clone());
  }
  if (new URL(request.url).origin !== self.location.origin) return found;
  const headers = new Headers(found.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  headers.set("Cross-Origin-Resource-Policy", "same-origin");
  return new Response(found.body, { status: found.status, statusText: found.statusText, headers });
}
