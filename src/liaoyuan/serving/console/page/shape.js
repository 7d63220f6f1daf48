// How pages make pictures: elements of SVG.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element: `shape("path", {d: "M0 0"}, child, …)`. */
export function shape(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
