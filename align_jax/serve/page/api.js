// What the page asks of its server, which is where the page came from and no other.

const BASE = new URL("./", document.baseURI);
BASE.username = BASE.password = ""; // the browser sends them by itself
const MOST_TRIES = 5;
const LONGEST_WAIT = 10; // s

/** An error that the server names: a line, and the input that it is about. */
export class ServerError extends Error {
  constructor(message, param = "") {
    super(message);
    this.param = param;
  }
}

/** The JSON that the server answers; a POST where there is a body. */
export async function ask(path, body, signal, say) {
  const options = { headers: { "Content-Type": "application/json" }, signal };
  if (body !== undefined) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  return (await send(new URL(path, BASE), options, say)).json();
}

/** The address of the picture of a row. */
export function pictureUrl(row) {
  return new URL(`v1/items/${encodeURIComponent(row)}/image`, BASE);
}

/** The picture of a row, as a blob. */
export async function fetchPicture(row) {
  return (await send(pictureUrl(row), {})).blob();
}

/** The response. Comes again where the server asks for it: while it warms up, and if it is busy. */
async function send(url, options, say = () => {}) {
  for (let tries = 1; ; tries++) {
    let response;
    try {
      response = await fetch(url, options);
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new ServerError("The server cannot be reached; is it still running?");
    }
    if (response.ok) return response;
    const { message, param, code } = await explain(response);
    const seconds = Number(response.headers.get("Retry-After") ?? NaN);
    const mayRetry = seconds <= LONGEST_WAIT && (code === "not_ready" || tries < MOST_TRIES);
    if (!mayRetry) throw new ServerError(message, param);
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
