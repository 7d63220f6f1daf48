// How pages make elements: attributes and text nodes, never markup.

/** Make an element: `element("p", {class: "x"}, child, …)`. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
