// The picture that is asked with: read from a file, made smaller where a server would refuse it.

import { cut, FieldError } from "./query.js";

const MAX_BYTES = 10 * 2 ** 20;
const MAX_PIXELS = 25e6;
const SMALLER_SIDE = 2048;

/** A picture {blob, name, row, note} from a file; `row` is the key of a row it came from. */
export async function readPicture(file, row = "") {
  const name = file.name ?? "";
  if (!file.size) throw new FieldError("picture", `${cut(name, 60)} is empty.`);
  if (file.type && !file.type.startsWith("image/")) {
    throw new FieldError("picture", `${cut(name, 60)} is no picture.`);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    // The server reads kinds that this browser does not.
    if (file.size <= MAX_BYTES) return { blob: file, name, row, note: "" };
    throw new FieldError("picture", `${cut(name, 60)} is too large; at most 10 MiB.`);
  }
  const { width, height } = bitmap;
  try {
    if (file.size <= MAX_BYTES && width * height <= MAX_PIXELS) {
      return { blob: file, name, row, note: "" };
    }
    const scale = Math.min(1, SMALLER_SIDE / Math.max(width, height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(width * scale));
    canvas.height = Math.max(1, Math.round(height * scale));
    const pen = canvas.getContext("2d");
    pen.fillStyle = "white";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
    if (!blob) throw new FieldError("picture", `${cut(name, 60)} is too large for this browser.`);
    const note = `sent as ${canvas.width} × ${canvas.height}, it has ${width} × ${height}`;
    return { blob, name, row, note };
  } finally {
    bitmap.close();
  }
}

/** The data URI of a blob. */
export function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new FieldError("picture", "The picture cannot be read again."));
    reader.readAsDataURL(blob);
  });
}
