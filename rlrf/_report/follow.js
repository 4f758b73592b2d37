"use strict";
// Of a page that `rlrf view` serves: asks for new data, and hands them to the page's own script.
(() => {
  const root = document.documentElement;
  let state = root.dataset.live, waiting = null;
  const say = (text) => { document.getElementById("live").textContent = text; };
  // Not under the reader's hand: an open list would close, a selection would be lost.
  const busy = () => document.activeElement.nodeName === "SELECT" || !getSelection().isCollapsed;
  async function look() {
    if (!document.hidden) {
      try {
        const reply = await fetch("data?state=" + encodeURIComponent(state), { cache: "no-store" });
        if (reply.status === 200) {
          waiting = await reply.json();
          state = waiting.state;
        } else if (reply.status !== 204) throw new Error(reply.statusText);
        if (waiting && !busy()) {
          document.dispatchEvent(new CustomEvent("rlrf-data", { detail: waiting.data }));
          waiting = null;
          root.dataset.followed = state;
        }
        say("● live");
      } catch (error) {
        say("○ rlrf view has ended; the page stays as it is");
      }
    }
    setTimeout(look, 2000);
  }
  look();
})();
