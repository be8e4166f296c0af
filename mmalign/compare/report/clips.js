"use strict";
// The clips of a row start together, and start again when the longest has ended. Only rows in view are loaded.
(() => {
  const button = document.querySelector(".toolbar .play");
  const inView = new Set();
  let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

  const clipsOf = (row) => [...row.querySelectorAll("video")];
  const again = (row) => {
    for (const clip of clipsOf(row)) {
      clip.currentTime = 0;
      if (playing) clip.play().catch(() => {});
    }
  };
  const loaded = (clip) => clip.readyState > 2 || clip.error ? null : new Promise((done) => {
    for (const event of ["canplaythrough", "error"]) clip.addEventListener(event, done, { once: true });
  });
  async function enter(row) {
    inView.add(row);
    for (const clip of clipsOf(row)) {
      clip.muted = true;
      clip.loop = false;
      clip.preload = "auto";
      if (!clip.getAttribute("src")) clip.src = clip.dataset.src;
    }
    await Promise.all(clipsOf(row).map(loaded));
    if (inView.has(row)) again(row);
  }
  function leave(row) {
    if (!inView.delete(row)) return;
    for (const clip of clipsOf(row)) {
      clip.removeAttribute("src");
      clip.load();
    }
  }

  const observer = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) (isIntersecting ? enter : leave)(target);
  });
  const watch = (rows) => { for (const row of rows) observer.observe(row); };
  watch(document.querySelectorAll(".cards .row"));
  const viewer = document.getElementById("viewer");
  new MutationObserver(() => watch(viewer.querySelectorAll(".row"))).observe(viewer, { childList: true });

  document.addEventListener("ended", ({ target }) => {
    const row = target.closest(".row");
    if (row && clipsOf(row).every((clip) => clip.ended || clip.error)) again(row);
  }, true);

  const label = () => { button.textContent = playing ? "Pause" : "Play"; };
  button.addEventListener("click", () => {
    playing = !playing;
    label();
    for (const row of inView) {
      for (const clip of clipsOf(row)) playing ? clip.ended || clip.play() : clip.pause();
    }
  });
  label();
})();
