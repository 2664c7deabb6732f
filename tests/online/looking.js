// What a careful person would check on the page as it stands. Gives a list of sentences, empty where all is well.
() => {
  const found = [];
  const seen = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true })
    && !element.closest(".unseen") && element.getClientRects().length > 0;
  const named = (element) => `${element.tagName.toLowerCase()}${element.id && "#" + element.id}.${element.className}`;

  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  function rgba(colour) { // whatever way it is written in
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  }
  function behind(element) {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
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

  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const element = words.currentNode.parentElement;
    if (!words.currentNode.data.trim() || !seen(element) || element.closest("script, noscript, :disabled, option, datalist")) continue;
    const style = getComputedStyle(element);
    const size = parseFloat(style.fontSize);
    const least = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
    const ratio = contrast(rgba(style.color), behind(element));
    if (ratio < least) found.push(`contrast ${ratio.toFixed(2)} of "${words.currentNode.data.trim()}"`);
  }
  for (const control of document.querySelectorAll("input:not([type=hidden], [type=checkbox], [type=radio]), select, textarea")) {
    if (!seen(control)) continue;
    const ratio = contrast(rgba(getComputedStyle(control).borderTopColor), behind(control.parentElement));
    if (ratio < 3) found.push(`edge of ${named(control)}: contrast ${ratio.toFixed(2)}`);
    const text = contrast(rgba(getComputedStyle(control, "::placeholder").color), behind(control));
    if (control.placeholder && text < 4.5) found.push(`placeholder of ${named(control)}: contrast ${text.toFixed(2)}`);
  }
  for (const control of document.querySelectorAll("a, button, input:not([type=hidden]), select, textarea, summary")) {
    if (!seen(control)) continue;
    const box = (control.closest("label") ?? control).getBoundingClientRect();
    if (box.height < 24) found.push(`${named(control)} is ${box.height.toFixed(1)} px high`);
  }

  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of ids.filter((id, place) => ids.indexOf(id) < place)) found.push(`id ${id} twice`);
  for (const element of document.querySelectorAll("[aria-describedby], [aria-labelledby], label[for]"))
    for (const id of `${element.getAttribute("aria-describedby") ?? ""} ${element.getAttribute("aria-labelledby") ?? ""} ${element.htmlFor ?? ""}`.split(" "))
      if (id && !document.getElementById(id)) found.push(`${named(element)} names ${id}, which is not there`);
  let level = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
    if (+heading.tagName[1] > level + 1) found.push(`${heading.tagName} "${heading.textContent.trim()}" after H${level}`);
    level = +heading.tagName[1];
  }
  if (document.querySelectorAll("h1").length !== 1) found.push("not exactly one h1");
  if (document.querySelectorAll("main").length !== 1) found.push("not exactly one main");
  if (document.documentElement.lang !== "en") found.push("no language");
  if (!document.title) found.push("no title");
  if (document.documentElement.scrollWidth > innerWidth)
    found.push(`${document.documentElement.scrollWidth} px wide in a window of ${innerWidth}`);
  return found;
}
