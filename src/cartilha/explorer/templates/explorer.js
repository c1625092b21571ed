() => {
  document.documentElement.lang = 'LANGUAGE';
  const kept = 'cartilha-text';
  // The text that was on the page in the other language; taken once.
  window.cartilhaKept = () => {
    const text = sessionStorage.getItem(kept);
    sessionStorage.removeItem(kept);
    return text;
  };
  // Marks the tokens that cover the characters [start, end), in each model's text.
  window.cartilhaMark = (start, end) => {
    for (const token of document.querySelectorAll('.tok[data-char]')) {
      const from = Number(token.dataset.char), to = Number(token.dataset.end);
      token.classList.toggle('chosen', from < end && start < to);
    }
  };
  document.addEventListener('click', (event) => {
    if (!event.target.closest('#switch')) return;
    const box = document.querySelector('#text textarea');
    if (box) sessionStorage.setItem(kept, box.value);
  });
}
