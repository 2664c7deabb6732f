// Shared by the server's page and the gallery of a run: clips that play under the pointer, and dialogs that show them.

export const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
export const start = (video) => video.play().catch(() => {}); // a pause may come before it has started

/** Return a new element. Leaves out children that are null. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Make a clip or image as large as its frame and this height allow. */
export function fit(media, aspect, height) {
  media.style.width = `min(100%, calc(${height} * ${aspect}))`;
}

/** Play the clips of the cards in an element under the pointer, and with the focus of the keyboard. */
export function playClips(root) {
  const screenOf = (event) => event.target.closest?.(".screen");
  const play = (screen) => {
    const video = screen?.querySelector("video");
    if (video && !reducedMotion.matches) start(video);
  };
  const stop = (screen) => {
    const video = screen?.querySelector("video");
    if (!video || (video.paused && video.currentTime === 0)) return;
    video.pause();
    video.load(); // shows the poster again
  };
  root.addEventListener("pointerover", (event) => { if (event.pointerType === "mouse" && !screenOf(event)?.contains(event.relatedTarget)) play(screenOf(event)); });
  root.addEventListener("pointerout", (event) => { if (!screenOf(event)?.contains(event.relatedTarget)) stop(screenOf(event)); });
  root.addEventListener("focusin", (event) => { if (event.target.matches(".open:focus-visible")) play(screenOf(event)); });
  root.addEventListener("focusout", (event) => { if (event.target.matches(".open")) stop(screenOf(event)); });
}

export const togglePlayback = (videos) => { const paused = videos[0]?.paused; for (const video of videos) paused ? start(video) : video.pause(); };

/** Let the arrow keys and the buttons `data-step` of a dialog call `step` with -1 or 1, and space pause its clip. */
export function browse(dialog, step) {
  // While it is captured: the player would use these keys to seek.
  dialog.addEventListener("keydown", (event) => {
    if (event.target.closest("textarea")) return;
    if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    else if (event.key === " " && !event.target.closest("button, a")) togglePlayback(dialog.querySelectorAll("video"));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }, true);
  dialog.addEventListener("click", (event) => {
    const button = event.target.closest("[data-step]");
    if (button && button.getAttribute("aria-disabled") !== "true") step(Number(button.dataset.step));
  });
}

/** Close a dialog with its buttons `data-close`, and with a click beside it. */
export function closable(dialog) {
  dialog.addEventListener("click", (event) => { if (event.target === dialog || event.target.closest("[data-close]")) dialog.close(); });
}
