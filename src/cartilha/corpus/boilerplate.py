"""Phrases in which sites speak about themselves, in Portuguese, Spanish and English."""

from __future__ import annotations

import re

PHRASE_CHARS = 40  # no phrase extends further from its anchor

# All in lower case. Each phrase contains its anchor, so that a text without anchors is passed over at once.
PHRASES = {
    anchor: re.compile("|".join(phrases))
    for anchor, phrases in {
        "cookie": (
            "(?:usa|usamos|utiliza|utilizamos|aceit[aeo]r?|política de|we use|uses?|accept(?: all)?)"
            " (?:os |todos os |las )?cookies",
            "cookies? (?:policy|settings|notice)",
        ),
        "javascript": (
            "(?:ativ[ae]r?|habilit[ae]r?|enable|activ[ae]r?) (?:o |el )?javascript",
            "javascript (?:is |está |foi )?(?:disabled|required|desativado|desabilitado)",
        ),
        "s reserv": ("(?:direitos|derechos) reservados", "rights reserved"),
        "privac": ("(?:políticas?|avisos?) de privacidade?", "privacy policy"),
        "termos de ": ("termos de (?:uso|serviço|utilização)",),
        "lorem ipsum": ("lorem ipsum",),
        "comentário": ("(?:deixe|deixar|escreva|envie|publicar) (?:o |um |o seu |seu |o teu )?comentário\\b",),
        "newsletter": ("(?:assine|inscreva-se|subscreva|receba|cadastre-se).{0,20}newsletter",),
        "compartilh": (
            "compartilh(?:e|ar) (?:isso|isto|no (?:face|twitter|whats)|no x|via|por e-?mail|este artigo|esta página)",
        ),
        "clique aqui": ("clique aqui (?:para|e) ",),
    }.items()
}
