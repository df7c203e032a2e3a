// What the page asks of its server, which is where the page came from and no other.

const BASE = new URL("./", document.baseURI);
const MOST_TRIES = 5;
const LONGEST_WAIT = 10; // s

let key = sessionStorage.getItem("key") ?? "";

/** An error that the server names: a line, the input that it is about, and the HTTP status. */
export class ServerError extends Error {
  constructor(message, param = "", status = 0) {
    super(message);
    this.param = param;
    this.status = status;
  }
}

/** Keeps the server's key until this tab is closed. */
export function useKey(text) {
  key = text;
  sessionStorage.setItem("key", text);
}

/** The JSON that the server answers; a POST where there is a body. Waits while it is busy. */
export async function ask(path, body, signal) {
  const options = { headers: { "Content-Type": "application/json" }, signal };
  if (body !== undefined) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  return (await send(new URL(path, BASE), options)).json();
}

/** The address of the picture of a row. */
export function pictureUrl(row) {
  return new URL(`v1/items/${encodeURIComponent(row)}/image`, BASE);
}

/** The picture of a row, as a blob. */
export async function fetchPicture(row, signal) {
  return (await send(pictureUrl(row), { signal })).blob();
}

/** Shows the picture of a row in an <img>, which cannot send a key by itself. */
export async function showPicture(img, row, signal) {
  if (!key) {
    img.src = pictureUrl(row);
    return;
  }
  try {
    const url = URL.createObjectURL(await fetchPicture(row, signal));
    img.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
    img.src = url;
  } catch {
    if (!signal.aborted) img.dispatchEvent(new Event("error"));
  }
}

async function send(url, options) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  for (let tries = 1; ; tries++) {
    let response;
    try {
      response = await fetch(url, { ...options, headers });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new ServerError("The server cannot be reached; is it still running?");
    }
    if (response.ok) return response;
    const seconds = Number(response.headers.get("Retry-After") ?? NaN);
    if (tries === MOST_TRIES || !(seconds <= LONGEST_WAIT)) throw await explain(response);
    await new Promise((resolve) => setTimeout(resolve, 1000 * Math.max(seconds, 0.5)));
    options.signal?.throwIfAborted();
  }
}

async function explain(response) {
  let error;
  try {
    ({ error } = await response.json());
  } catch {
    // A proxy answers in words of its own.
  }
  const message = error?.message || `The server answers ${response.status}.`;
  return new ServerError(String(message), String(error?.param ?? ""), response.status);
}
