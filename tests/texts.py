"""A little text in three languages, enough to train a vocabulary of 600 on."""

TEXTS = [
    "A mixture of experts sends every token to a few small networks instead of one large network. "
    "The router scores the experts and keeps the best six; the others stay asleep, and the answer is their sum.\n",
    "Hello! How are you today? I am a small model that lives in this notebook, and I was trained on very little text. "
    "Ask me about attention, about the cache, or about the weather, which I cannot see from here.\n",
    "The cache remembers one short latent vector for each token and layer, so that long conversations stay cheap. "
    "Nothing else is stored: keys and values are computed from the latent vector when they are wanted.\n",
    "Bonjour ! Comment allez-vous aujourd'hui ? Le petit modèle répond en français, mais il se trompe souvent. "
    "Chaque expert apprend une partie du travail, et le routeur choisit les meilleurs pour chaque mot.\n",
    "你好！今天天气怎么样？我是一个小模型，住在这个笔记本里。每个词都会被送到几个专家那里，路由器选择最好的专家。\n",
    "注意力机制读取缓存中的向量。你好，世界！小模型会说中文、英文和法文。天气很好，专家很多，缓存很小。\n",
    "12 + 30 = 42, 7 * 8 = 56, and 100 - 1 = 99.\n\n\tif x > 0:\n\t\treturn x ** 2\n",
]
