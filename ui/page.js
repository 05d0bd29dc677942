/* The few things that only the browser can do. Everything else is a Gradio event. */
window.sotto = {
  /* Whether the player plays: its own events say so (recording.py). */
  playing: false,

  /* The recording stays in the page when hidden, so that it is still there on the way back. */
  hideRecording(isHidden) {
    document.documentElement.classList.toggle('recording-hidden', isHidden);
  },

  /* The name under which the server keeps this browser's last comparison; a new one where nothing may be stored. */
  browser() {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    const fresh = Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
    try {
      const name = localStorage.getItem('sotto-browser') || fresh;
      localStorage.setItem('sotto-browser', name);
      return name;
    } catch {
      return fresh;
    }
  },

  /* Play the recording unless it plays already; the position was set by the event before. */
  play() {
    const button = document.querySelector('#player .play-pause-button');
    if (button && !sotto.playing) button.click();
  },

  /* Press the recorder's own button, which comes once the player is empty. */
  record(n_looks = 40) {
    const button = document.querySelector('#player .record-button');
    if (button) button.click();
    else if (n_looks > 0) setTimeout(() => sotto.record(n_looks - 1), 50);
  },

  /* A new recording: what the browser said of the last one is over. */
  assumePlayable() {
    document.documentElement.classList.remove('unplayable');
  },

  /* The player writes the length of a recording when it has read it; a position that is set before that is lost. */
  loading(file) {
    document.querySelector('#player #duration')?.replaceChildren();
    return file;
  },
  async loaded() {
    const until = Date.now() + 5000;
    while (document.querySelector('#player #duration')?.textContent === '' && Date.now() < until) {
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  },

  /* One line per segment, as in the txt file. */
  copyTranscript() {
    const lines = [...document.querySelectorAll('#segments .segment p')].map((line) => line.textContent);
    return sotto.copy(lines.join('\n'));
  },

  /* Copy text to the clipboard; pages without https have no clipboard interface and take the older way. */
  async copy(text) {
    if (navigator.clipboard && window.isSecureContext) return void (await navigator.clipboard.writeText(text));
    const area = Object.assign(document.createElement('textarea'), { value: text });
    area.style.position = 'fixed';
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  },
};

/* What becomes of a piece of work is read out, by a region that lasts: one that Gradio writes anew is not listened to.
   While it runs its status changes several times a second, so only the first sentence is said and the one at the end.
   An error is an alert, which is read out by itself. */
const STATUS = '#transcribe-status, #language-status, #compare-status, #calibrate-status';
const announcer = Object.assign(document.createElement('div'), { id: 'announcer' });
announcer.setAttribute('role', 'status');
const running = new Set();

function announce(status) {
  const sentence = status.querySelector('.prose')?.innerText.trim();
  if (!sentence || status.querySelector('.empty')) return;
  const isRunning = status.querySelector('.progress') !== null;
  const isKnown = isRunning && running.has(status.id);
  running[isRunning ? 'add' : 'delete'](status.id);
  if (!isKnown && !status.querySelector('[role=alert]')) announcer.textContent = sentence;
}

document.body.append(announcer); // Gradio adds this script when the body is there
new MutationObserver((changes) => {
  const elements = changes.map(({ target }) => target.closest ? target : target.parentElement);
  const statuses = elements.map((element) => element?.closest('.prose')?.closest(STATUS)).filter(Boolean);
  new Set(statuses).forEach(announce);
}).observe(document.body, { childList: true, characterData: true, subtree: true });

/* The browser gives the microphone only to secure origins: say so instead of a button that does nothing. */
if (!window.isSecureContext) document.documentElement.classList.add('insecure-origin');

/* A format that this browser cannot play is still transcribed: say so under the silent player. */
document.addEventListener('error', (event) => {
  if (event.target.matches && event.target.matches('#player audio')) {
    document.documentElement.classList.add('unplayable');
  }
}, true);
