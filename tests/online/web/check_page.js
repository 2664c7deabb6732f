// Check the layout of the current page, beyond what axe-core checks. Returns a list of messages, empty if there are none.
() => {
  const problems = [];
  const isVisible = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true })
    && !element.closest(".visually-hidden") && element.getClientRects().length > 0;
  const describe = (element) => `${element.tagName.toLowerCase()}${element.id && "#" + element.id}.${element.className}`;

  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  function luminance(colour) { // from any CSS notation
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  function contrast(one, other) {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  }
  for (const control of document.querySelectorAll("input:not([type=hidden], [type=checkbox], [type=radio]), select, textarea")) {
    if (!isVisible(control)) continue;
    const style = getComputedStyle(control);
    const ratio = contrast(style.borderTopColor, style.backgroundColor);
    if (ratio < 3) problems.push(`edge of ${describe(control)}: contrast ${ratio.toFixed(2)}`);
  }
  for (const control of document.querySelectorAll("a, button, input:not([type=hidden]), select, textarea, summary")) {
    if (!isVisible(control) || control.matches("p > a")) continue; // a link in a sentence has the height of its line
    const box = (control.closest("label") ?? control).getBoundingClientRect();
    if (box.height < 24) problems.push(`${describe(control)} is ${box.height.toFixed(1)} px high`);
  }
  const ARROW = 20;
  for (const select of document.querySelectorAll("select")) {
    if (!isVisible(select)) continue;
    const style = getComputedStyle(select);
    context.font = style.font;
    const room = select.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - ARROW;
    for (const { text } of select.options) {
      const width = context.measureText(text).width;
      if (width > room) problems.push(`${describe(select)} cuts "${text}": ${width.toFixed(0)} px, has ${room.toFixed(0)}`);
    }
  }
  for (const heading of document.querySelectorAll("th")) {
    if (!isVisible(heading)) continue;
    const style = getComputedStyle(heading);
    context.font = style.font;
    const room = heading.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    for (const word of heading.textContent.split(" "))
      if (context.measureText(word).width > room + 1) problems.push(`the heading "${heading.textContent}" is broken inside a word`);
  }
  if (document.documentElement.scrollWidth > innerWidth)
    problems.push(`${document.documentElement.scrollWidth} px wide in a window of ${innerWidth}`);
  return problems;
}
