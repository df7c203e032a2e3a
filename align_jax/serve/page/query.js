// What is asked: the filter that lines say, and the state of the page in the fragment of its URL.

export const DEFAULTS = {
  mode: "search", text: "", add: "", remove: "", labels: "", template: "a photo of a {}.",
  texts: "", kind: "image", filter: "", k: "24", weight: "",
};
const MODES = ["search", "classify", "compare"];
const SIGNS = { "=": "eq", "==": "eq", "!=": "ne", "<": "lt", "<=": "lte", ">": "gt", ">=": "gte" };
const TEXT_FIELDS = ["key", "kind", "caption", "source"];

/** An error that belongs to one field of the form. */
export class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/** Lines that are not blank, without the spaces around them. */
export function lines(text) {
  return text.split("\n").map((line) => line.trim()).filter((line) => line);
}

/** The filter that lines say, in the words of `align search --filter`; undefined for none. */
export function parseFilter(text) {
  const found = new Map();
  for (const line of lines(text)) {
    for (const [field, condition] of parseLine(line)) {
      const known = found.get(field) ?? {};
      for (const name of Object.keys(condition)) {
        if (Object.hasOwn(known, name)) {
          throw new FieldError("filter", `${cut(field, 40)} has the condition ${name} twice.`);
        }
      }
      found.set(field, { ...known, ...condition });
    }
  }
  return found.size ? Object.fromEntries(found) : undefined;
}

/** The fragment of a state: what differs from the defaults, and the row of the index or file. */
export function toFragment(state, row, fileName) {
  const found = new URLSearchParams();
  for (const [name, value] of Object.entries(DEFAULTS)) {
    if (state[name] !== value) found.set(name, state[name]);
  }
  if (row) found.set("row", row);
  if (fileName) found.set("file", cut(fileName, 80));
  const text = found.toString();
  return text ? `#${text}` : "";
}

/** The state, row and file name of a fragment; what it does not know is left out. */
export function fromFragment(fragment) {
  const given = new URLSearchParams(fragment.replace(/^#/, ""));
  const state = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) {
    if (given.has(name)) state[name] = given.get(name);
  }
  for (const name of ["k", "weight"]) {
    if (!Number.isFinite(Number(state[name]))) state[name] = DEFAULTS[name];
  }
  if (!MODES.includes(state.mode)) state.mode = DEFAULTS.mode;
  if (!["image", "text", "any"].includes(state.kind)) state.kind = DEFAULTS.kind;
  return { state, row: given.get("row") ?? "", fileName: given.get("file") ?? "" };
}

/** At most `most` characters of a text; an ellipsis says that there are more. */
export function cut(text, most) {
  const start = [...text.slice(0, 2 * most + 2)];
  return start.length > most ? `${start.slice(0, most).join("")}…` : text;
}

function parseLine(line) {
  if (line.startsWith("{")) {
    const parts = readJson(line);
    if (parts === undefined) throw new FieldError("filter", `${cut(line, 60)} is no JSON.`);
    return Object.entries(parts).map(([field, value]) => [
      field,
      value !== null && typeof value === "object" && !Array.isArray(value) ? value : { eq: value },
    ]);
  }
  const isIn = line.match(/^(\S+)\s+in\s+(.+)$/s);
  if (isIn) {
    return [[isIn[1], { in: isIn[2].split(",").map((one) => parseValue(isIn[1], one.trim())) }]];
  }
  const parts = line.match(/^([^=!<>]+?)\s*(==|!=|<=|>=|=|<|>)\s*(.*)$/s);
  if (!parts) {
    throw new FieldError("filter", `${cut(line, 60)} is no filter; write field=value.`);
  }
  return [[parts[1], { [SIGNS[parts[2]]]: parseValue(parts[1], parts[3]) }]];
}

function parseValue(field, text) {
  if (text.length > 1 && text.startsWith('"') && text.endsWith('"')) return text.slice(1, -1);
  if (TEXT_FIELDS.includes(field)) return text;
  const value = readJson(text);
  if (typeof value === "boolean") return value;
  if (typeof value !== "number" || !Number.isFinite(value)) return text;
  if (/^-?\d+$/.test(text) && !Number.isSafeInteger(value)) {
    throw new FieldError("filter", `${cut(text, 40)} is too large; put a text in "quotes".`);
  }
  return value;
}

function readJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
