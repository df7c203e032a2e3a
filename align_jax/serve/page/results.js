// Results: a grid of rows of the index, or lines with bars. All of their text is put in as text.

import { pictureUrl } from "./api.js";
import { cut } from "./query.js";

const MOST_CHARACTERS = 300;

/** Fills the list with hits; `use` is called with the one that is chosen. */
export function showHits(list, hits, use) {
  list.className = "hits";
  list.replaceChildren(...hits.map((hit) => {
    const item = document.createElement("li");
    const button = item.appendChild(document.createElement("button"));
    button.type = "button";
    button.className = "hit";
    const caption = cut(hit.caption || "", MOST_CHARACTERS);
    if (hit.image) {
      const img = button.appendChild(document.createElement("img"));
      img.alt = caption || `picture ${cut(hit.key, MOST_CHARACTERS)}`;
      img.loading = "lazy";
      img.decoding = "async";
      img.addEventListener("error", () => img.replaceWith(words("This picture cannot be read.")));
      img.src = pictureUrl(hit.key);
    } else {
      button.append(words(caption || hit.key));
    }
    button.append(span("score", hit.score.toFixed(3)));
    if (hit.image && caption) {
      const below = span("caption", caption);
      below.title = caption;
      below.setAttribute("aria-hidden", "true"); // it is the picture's alternative text
      button.append(below);
    }
    const extra = Object.entries(hit.meta ?? {}).map(([name, value]) => `${name}: ${value}`);
    button.append(span("extra", cut([hit.key, ...extra].join(" · "), MOST_CHARACTERS)));
    button.addEventListener("click", () => use(hit));
    return item;
  }));
}

/** Fills the list with [text, share from 0 to 1, what is written beside it]. */
export function showBars(list, rows) {
  list.className = "bars";
  list.replaceChildren(...rows.map(([text, share, beside]) => {
    const item = document.createElement("li");
    item.append(span("label", cut(text, MOST_CHARACTERS)), span("score", beside));
    item.style.setProperty("--part", String(Math.min(1, Math.max(0, share))));
    return item;
  }));
}

function words(text) {
  return span("words", cut(text, MOST_CHARACTERS));
}

function span(className, text) {
  const made = document.createElement("span");
  made.className = className;
  made.dir = "auto";
  made.textContent = text;
  return made;
}
