"""What sites say about themselves rather than in their text: phrases in Portuguese, Spanish and English."""

from __future__ import annotations

import re

# In lower case, as the phrases are. Each phrase holds one, so that a text without any is passed over at once.
ANCHORS = (
    "cookie",
    "javascript",
    "os reservados",
    "rights reserved",
    "privacidad",
    "privacy policy",
    "termos de ",
    "lorem ipsum",
    "comentário",
    "newsletter",
    "compartilh",
    "clique aqui",
)
PHRASES = re.compile(
    "|".join(
        (
            "(?:usa|usamos|utiliza|utilizamos|aceit[aeo]r?|política de|usa|utiliza|we use|uses?|accept(?: all)?)"
            " (?:os |todos os |las )?cookies",
            "cookies? (?:policy|settings|notice)",
            "(?:ativ[ae]r?|habilit[ae]r?|enable|activ[ae]r?) (?:o |el )?javascript",
            "javascript (?:is |está |foi )?(?:disabled|required|desativado|desabilitado)",
            "(?:direitos|derechos) (?:são )?reservados",
            "rights reserved",
            "(?:políticas?|avisos?) de privacidade?",
            "privacy policy",
            "termos de (?:uso|serviço|utilização)",
            "lorem ipsum",
            "(?:deixe|deixar|escreva|envie|publicar) (?:o |um |o seu |seu |o teu )?comentário\\b",
            "(?:assine|inscreva-se|subscreva|receba|cadastre-se).{0,20}newsletter",
            "compartilh(?:e|ar) (?:isso|isto|no (?:face|twitter|whats)|no x|via|por e-?mail|este artigo|esta página)",
            "clique aqui (?:para|e) ",
        )
    )
)
