// What the page asks of its server, which is where the page came from and no other.

const BASE = new URL("./", document.baseURI);
BASE.username = BASE.password = ""; // fetch takes no address with a password
const MOST_TRIES = 5;
const LONGEST_WAIT = 10; // s
const AHEAD = "600px"; // pictures that far below the window are loaded

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

/** The JSON that the server answers; a POST where there is a body. */
export async function ask(path, body, signal, say) {
  const options = { headers: { "Content-Type": "application/json" }, signal };
  if (body !== undefined) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  return (await send(new URL(path, BASE), options, say)).json();
}

/** The picture of a row, as a blob. */
export async function fetchPicture(row) {
  return (await send(pictureUrl(row), {})).blob();
}

/** Shows the picture of a row in an <img>, which cannot send a key by itself. */
export function showPicture(img, row) {
  if (!key) {
    img.src = pictureUrl(row);
    return;
  }
  const observer = new IntersectionObserver(async (entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    try {
      const url = URL.createObjectURL(await fetchPicture(row));
      img.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
      img.src = url;
    } catch {
      img.dispatchEvent(new Event("error"));
    }
  }, { rootMargin: AHEAD });
  observer.observe(img);
}

function pictureUrl(row) {
  return new URL(`v1/items/${encodeURIComponent(row)}/image`, BASE);
}

/** The response. Comes again where the server asks for it: while it warms up, and if it is busy. */
async function send(url, options, say = () => {}) {
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
    const { message, param, code } = await explain(response);
    const seconds = Number(response.headers.get("Retry-After") ?? NaN);
    const mayRetry = seconds <= LONGEST_WAIT && (code === "not_ready" || tries < MOST_TRIES);
    if (!mayRetry) throw new ServerError(message, param, response.status);
    say(message);
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
  const message = String(error?.message || `The server answers ${response.status}.`);
  return { message, param: String(error?.param ?? ""), code: error?.code };
}
