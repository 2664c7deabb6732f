// Check the current page for accessibility and layout problems. Returns a list of messages, empty if there are none.
() => {
  const problems = [];
  const isVisible = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true })
    && !element.closest(".visually-hidden") && element.getClientRects().length > 0;
  const describe = (element) => `${element.tagName.toLowerCase()}${element.id && "#" + element.id}.${element.className}`;

  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  function rgba(colour) { // from any CSS notation
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  }
  function background(element) {
    for (let ancestor = element; ancestor; ancestor = ancestor.parentElement) {
      const colour = rgba(getComputedStyle(ancestor).backgroundColor);
      if (colour[3] > 0.99) return colour;
    }
    return [1, 1, 1, 1];
  }
  function luminance(colour) {
    const [r, g, b] = colour.map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  function contrast(one, other) {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  }

  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !isVisible(element) || element.closest("script, noscript, :disabled, option, datalist")) continue;
    const style = getComputedStyle(element);
    const size = parseFloat(style.fontSize);
    const required = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    const ratio = contrast(rgba(style.color), background(element));
    if (ratio < required) problems.push(`contrast ${ratio.toFixed(2)} of "${texts.currentNode.data.trim()}"`);
  }
  for (const control of document.querySelectorAll("input:not([type=hidden], [type=checkbox], [type=radio]), select, textarea")) {
    if (!isVisible(control)) continue;
    const ratio = contrast(rgba(getComputedStyle(control).borderTopColor), background(control.parentElement));
    if (ratio < 3) problems.push(`edge of ${describe(control)}: contrast ${ratio.toFixed(2)}`);
    const text = contrast(rgba(getComputedStyle(control, "::placeholder").color), background(control));
    if (control.placeholder && text < 4.5) problems.push(`placeholder of ${describe(control)}: contrast ${text.toFixed(2)}`);
  }
  for (const control of document.querySelectorAll("a, button, input:not([type=hidden]), select, textarea, summary")) {
    if (!isVisible(control)) continue;
    const box = (control.closest("label") ?? control).getBoundingClientRect();
    if (box.height < 24) problems.push(`${describe(control)} is ${box.height.toFixed(1)} px high`);
  }

  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of ids.filter((id, place) => ids.indexOf(id) < place)) problems.push(`duplicate id ${id}`);
  for (const element of document.querySelectorAll("[aria-describedby], [aria-labelledby], label[for]"))
    for (const id of `${element.getAttribute("aria-describedby") ?? ""} ${element.getAttribute("aria-labelledby") ?? ""} ${element.htmlFor ?? ""}`.split(" "))
      if (id && !document.getElementById(id)) problems.push(`${describe(element)} refers to missing id ${id}`);
  let level = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
    if (+heading.tagName[1] > level + 1) problems.push(`${heading.tagName} "${heading.textContent.trim()}" after H${level}`);
    level = +heading.tagName[1];
  }
  if (document.querySelectorAll("h1").length !== 1) problems.push("must have exactly one h1");
  if (document.querySelectorAll("main").length !== 1) problems.push("must have exactly one main");
  if (document.documentElement.lang !== "en") problems.push("lang is not en");
  if (!document.title) problems.push("no title");
  if (document.documentElement.scrollWidth > innerWidth)
    problems.push(`${document.documentElement.scrollWidth} px wide in a window of ${innerWidth}`);
  return problems;
}
