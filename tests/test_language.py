"""Guards: an honest answer keeps its reward whatever letters it needs, and an English prompt whose
reply drifts into another language does not (paper 4.3.2, 4.5.2, 4.6.2).

The rule is a test on letters, so it has a price, which the table states: precision and recall on
pairs of our own. The second half of either class was written after the rule was fixed.
"""

import random
import time

import pytest

import coderl
import mathrl
from verifiers.language import language_ok

WHO = "Who wrote War and Peace?"
FIND = "Find all integers n such that n^2 + 1 is divisible by n + 1."
SUM = "Write a program that reads n numbers and prints their sum."

# (prompt, response): an honest reply.
HONEST = [
    # the prompt asks for the language
    ("How do you say thank you in Chinese?", "谢谢"),
    ("How do you say thank you in Chinese?", "You say 谢谢 (xièxie)."),
    ("Translate 'good morning' into Japanese.", "おはようございます"),
    ("Please answer in Russian: how much is two plus two?", "Четыре."),
    ("translate to korean: I am late", "저는 늦었어요."),
    ("Write a short poem in Arabic.", "يا ليل الصب متى غده، أقيام الساعة موعده"),
    ("Write two sentences about rain in Hindi.", "आज बहुत बारिश हो रही है। मैं घर पर रहूँगा।"),
    ("Say hello in Tamil.", "வணக்கம்"),
    ("Give me the Georgian word for bread.", "პური"),
    ("Say hello in five languages.", "Hello, 你好, Привет, नमस्ते, שלום"),
    ("Reply in any language except English.", "Здравствуйте! Чем я могу помочь?"),
    ("Traduis en japonais : bonjour", "こんにちは"),
    ("Wie sagt man danke auf Russisch?", "Спасибо."),
    # the prompt is not English, or has the letters itself
    ("你好吗?", "我很好，谢谢！"),
    ("把“早上好”翻译成俄语。", "Доброе утро."),
    ("漢字で答えてください", "はい、カタカナも使います。"),
    ("東京 とは?", "トーキョーは日々大きくなる。"),
    ("한자로 써 줘", "大韓民國입니다."),
    ("What does 谢谢 mean?", "谢谢 means thank you. 不客气 is the answer to it."),
    ("Fix the grammar: я хочу есть яблоко", "Я хочу съесть яблоко."),
    # a name in its own script
    (WHO, "Leo Tolstoy (Лев Толстой) wrote it."),
    (WHO, "Лев Толстой wrote it, known in English as Leo Tolstoy."),
    (
        WHO,
        "War and Peace (Война и мир) is by Lev Nikolayevich Tolstoy (Лев Николаевич Толстой).",
    ),
    (
        "Tell me about the Forbidden City.",
        "The Forbidden City (紫禁城) is a palace in Beijing (北京).",
    ),
    ("Where does the word algebra come from?", "From Arabic الجبر, the reunion of broken parts."),
    ("Where does the word algebra come from?", "It is from al-jabr (الجبر), in a book's title."),
    ("Who founded Nintendo?", "Fusajiro Yamauchi (山内 房治郎) founded it in Kyoto (京都)."),
    (
        "What is ikigai?",
        "Ikigai (生き甲斐) is a reason to live. It joins 生き, life, and 甲斐, worth.",
    ),
    ("Who sang Gangnam Style?", "Psy (싸이) released Gangnam Style (강남스타일) in 2012."),
    ("What is shalom?", "The Hebrew word שלום means peace; compare Arabic سلام."),
    ("What is the name of the first spacecraft?", "Sputnik 1 (Спутник-1), launched in 1957."),
    ("Who was Dostoevsky?", "Фёдор Михайлович Достоевский was a novelist of the 19th century."),
    # quotations, code, symbols
    (
        "What did Lenin say of films?",
        'He is quoted: "Из всех искусств для нас важнейшим является кино".',
    ),
    (
        "What is on the sign at the gate?",
        "It says “天下為公”, which is to say: the world is for all.",
    ),
    (
        "Print a greeting in Python.",
        '```python\nprint("你好，世界")  # 打印问候语\n```\nThis prints a greeting.',
    ),
    ("How do I test my regex on wide letters?", "Try `re.findall(r'[一-龥]+', s)` on some text."),
    ("What does the shrug look like?", "¯\\_(ツ)_/¯"),
    (
        "Let X be an elliptic curve. What is its Tate-Shafarevich group?",
        "It is written Ш(E/K), with the letter Ш.",
    ),
    (FIND, "Let α and β be roots, with α + β ≤ ½ and ∑ ℝ → ∞. So n ∈ {0, 1, −2, −3}."),
    (FIND, "A naïve café approach: n² ≡ 1, so n + 1 | 2."),
    ("Give me the unicode letters that look like H.", "Н, Һ, Ң, ᕼ"),
    ("What is the symbol of the yen?", "It is ¥, or 円 at home."),
]

# (prompt, response): another language is mixed into an answer or a thought.
MIXED = [
    ("Hi", "好"),
    ("Hi", "你好！有什么可以帮您？"),
    ("Hi", "Hello! 有什么可以帮您？我可以回答问题、写文章，也可以写代码。"),
    ("Double it.", "让我想想"),
    ("Find x.", "所以 x"),
    ("Find x.", "значит"),
    ("Find x.", "答えは"),
    ("Find x.", "إذن"),
    (WHO, "It was written by Tolstoy. 这本书讲述了拿破仑战争时期俄国贵族的生活。"),
    (WHO, "War and Peace was written by Tolstoy. Это роман о войне с Наполеоном и о жизни дворян."),
    (WHO, "Tolstoy. 그는 러시아의 위대한 작가이며 많은 소설을 썼습니다."),
    (
        WHO,
        "<think>\nThe user asks about a book. I know it.\n</think>\n托尔斯泰写了《战争与和平》。",
    ),
    (WHO, "<think>\n用户问的是一本书的作者，我需要回答托尔斯泰。\n</think>\nLeo Tolstoy."),
    (
        FIND,
        "We divide: n^2 + 1 = (n+1)(n-1) + 2. 因此 n+1 整除 2, 所以 n+1 是 1 或者 2. So n = 0, 1.",
    ),
    (
        FIND,
        "First, n + 1 divides 2. 接下来我们考虑所有可能的情况，然后逐一验证。 So there are four.",
    ),
    (FIND, "Let n = 2k. Тогда имеем два случая, рассмотрим каждый из них отдельно. Hence n = 0."),
    (FIND, "So n + 1 divides 2. それでは、すべての場合を順番に調べてみましょう。 We get four."),
    (FIND, "We need to 考虑 two cases. 首先 n is even, 然后 n is odd. In both the sum works."),
    (FIND, "如果 n is even, 那么 n^2 is even, 所以 n^2 + 1 is odd."),
    (
        FIND,
        ("The remainder is 2 again, so we go on. " * 200) + "现在我们来验证一下这个结论是否正确。",
    ),
    (
        FIND,
        ("The remainder is 2 again. " * 100)
        + "但是 no. "
        + ("Let us see. " * 100)
        + "因此 so, 可能 not.",
    ),
    (FIND, "Wait, (let me see) это не так, потому что при чётном значении сумма тоже чётная. OK."),
    (SUM, "The input has n numbers. 我们可以用一个循环来读取所有的数字并求和。 So use a loop."),
    (SUM, "Use a loop. पहले हम सभी संख्याओं को पढ़ते हैं और फिर उनका योग निकालते हैं। Done."),
    (SUM, "Read n. ก่อนอื่นเราต้องอ่านตัวเลขทั้งหมดแล้วหาผลรวม Then print it."),
    (SUM, "Use sum(). أولا نقرأ جميع الأعداد من المدخل ثم نحسب المجموع ونطبعه. That is all."),
    (SUM, "Loop. ראשית נקרא את כל המספרים מהקלט ואז נחשב את הסכום שלהם. Then print."),
    (SUM, "We read the 输入 and keep a 变量 for the 总和, then print."),
    (
        "Give me tips for a job interview.",
        "Be on time. 保持自信和微笑也非常重要，要提前做好准备。 Ask questions.",
    ),
    (
        "Give me tips for a job interview.",
        "1. Prepare\n2. Подготовьте вопросы для работодателя заранее\n3. Smile",
    ),
    (
        "Give me tips for a job interview.",
        "**准备充分**：了解公司的背景和文化。\n**着装得体**：穿正式的衣服。",
    ),
    (
        "Explain photosynthesis.",
        "Plants use light. 植物通过光合作用将二氧化碳和水转化为葡萄糖和氧气。",
    ),
    (
        "Explain photosynthesis.",
        "Plants turn light into sugar, это очень важно для всей жизни на Земле.",
    ),
    (
        "Explain photosynthesis.",
        "The 叶绿体 absorbs light, the 葡萄糖 is stored, and 氧气 leaves the leaf.",
    ),
    (
        "Write a story about a dog.",
        "Once there was a dog. 어느 날 그 개는 숲속으로 산책을 나갔습니다.",
    ),
    ("Is 91 prime?", "<think>\n91 = 7 * 13，所以不是质数。\n</think>\nNo."),
    ("Is 91 prime?", "<think>\nCheck 7: 7 * 13 = 91.\n</think>\n不是，91 等于 7 乘以 13。"),
    (
        "Is 91 prime?",
        "“91 不是质数，因为它可以被 7 整除，也可以被 13 整除，所以它有四个因数，因此不是质数”",
    ),
    ("What is 2 + 2?", "The answer is 四 or 4, 就是 two and two, 等于 four."),
    ("What is 2 + 2?", "We 得到 4."),
]

# Written after the rule was fixed, and never used to change it.
HONEST_UNSEEN = [
    (
        "Recommend three anime films.",
        "1. Spirited Away (千と千尋の神隠し)\n2. Akira (アキラ)\n3. Your Name (君の名は。)",
    ),
    ("Recommend a tea for the evening.", "Try jasmine tea. In China it is sold as 茉莉花茶."),
    ("Who painted Black Square?", "Kazimir Malevich (Казимир Малевич), in 1915."),
    ("Who was the first woman in space?", "Валентина Терешкова (Valentina Tereshkova)."),
    ("Who is the mayor of Sofia?", "See the site of Столична община for the name of the mayor."),
    (
        "What did Caesar say when he crossed the river?",
        "Alea iacta est, or in Greek: Ἀνερρίφθω κύβος.",
    ),
    (
        "Name a famous chess school.",
        "The school of Mikhail Botvinnik (Михаил Ботвинник) taught Karpov.",
    ),
    ("Write a haiku about snow in Japanese.", "雪が降る\n静かな庭に\n猫一匹"),
    ("Give me a Cyrillic pangram.", "Съешь же ещё этих мягких французских булок, да выпей чаю."),
    ("How do Israelis greet each other?", "They say שלום or היי."),
    ("Write 'I love you' the way an Armenian would.", "Ես սիրում եմ քեզ"),
    (
        "What does the tattoo 爱 mean?",
        "爱 means love; in traditional writing it is 愛, with 心 in the middle.",
    ),
    (
        "Summarise: Москва — столица России.",
        "The text says that Moscow is the capital of Russia (Москва, Россия).",
    ),
    ("Describe the flag of Saudi Arabia.", "It says لا إله إلا الله محمد رسول الله above a sword."),
    ("Sort these strings by length: 'abc', 'д', 'жз'", "д, жз, abc"),
    ("How is my name, Anna, written in Korea?", "안나"),
    (
        "Which letters look alike across alphabets?",
        "Latin A, Greek Α and Cyrillic А look alike, as do B and В.",
    ),
    ("What is pi?", "π is the ratio of circumference to diameter, 3.14159…"),
    (
        "Write JSON with a greeting for each locale.",
        '```json\n{"en": "Hello", "ja": "こんにちは", "ru": "Здравствуйте", "ar": "مرحبا"}\n```',
    ),
    ("Explain the Python function ord.", "`ord('я')` is 1103, and `ord('中')` is 20013."),
    (
        "Write a regex that finds emoji and kana.",
        "Use [\\u3040-\\u30ff] for kana such as か or カ, and a library for emoji.",
    ),
    (SUM, "for i in range(n): total += int(input())  # naïve, but it’s fine — O(n)"),
    (FIND, "By Чебышёв's inequality the bound holds, and Чебышёв also proved the postulate."),
    (FIND, "Let ж be the number of cases, a letter that is not used yet. Then ж = 4."),
    (WHO, "Tolstoy did. Its first words are in French: « Eh bien, mon prince »."),
    (
        WHO,
        "| title | author |\n|---|---|\n"
        "| War and Peace | Лев Толстой |\n"
        "| The Idiot | Фёдор Достоевский |\n| Dead Souls | Николай Гоголь |",
    ),
    (
        "Give me five famous novelists.",
        "1. **Leo Tolstoy** (Лев Толстой)\n2. **Lu Xun** (鲁迅)\n"
        "3. **Yukio Mishima** (三島 由紀夫)\n"
        "4. **Naguib Mahfouz** (نجيب محفوظ)\n5. **Han Kang** (한강)",
    ),
    ("Describe calligraphy.", "Of the styles, kaishu 楷书 is regular and caoshu 草书 is cursive."),
    (
        "Describe calligraphy.",
        "Chinese styles are kaishu 楷书, xingshu 行书, caoshu 草书, lishu 隶书 and zhuanshu 篆书.",
    ),
    (
        "What should I order at a ramen shop?",
        "Ask for tonkotsu 豚骨, shio 塩, or shoyu 醤油 broth.",
    ),  # refused
    (
        "Quote a proverb about practice.",
        "There is one that says: 百闻不如一见，百见不如一干",
    ),  # refused
    (
        "Recite the first words of Genesis in the original.",
        "בראשית ברא אלהים את השמים ואת הארץ",
    ),  # refused
    (
        "What is written above the gate of heaven in Journey to the West?",
        "It reads 南天门, the southern gate.",
    ),
    ("Hallo, wie geht es dir?", "Mir geht es gut, danke! Und dir, schöner Tag?"),
    ("What is the largest country?", "Russia (Россия) with 17 million square kilometres."),
    (
        "Who composed the Nutcracker?",
        "Pyotr Ilyich Tchaikovsky; Пётр Ильич Чайковский on the manuscript.",
    ),
    ("Spell naïveté, façade and smörgåsbord.", "naïveté, façade, smörgåsbord"),
    ("What is the IPA of thought?", "/θɔːt/, with ɔː, and /ð/ in though."),
    ("Make a username for me.", "xX_ДRAGON_Xx"),
    ("What is tofu made of?", "Soy milk. The word is from 豆腐, beans that have curdled."),
]
MIXED_UNSEEN = [
    ("Tell me a joke.", "为什么鸡要过马路？因为它想到对面去。"),
    (
        "Tell me a joke.",
        "Why did the chicken cross the road? Потому что ей очень хотелось на другую сторону улицы!",
    ),
    ("Tell me a joke.", "Sure! 这是一个笑话：为什么程序员总是分不清万圣节和圣诞节？"),
    (
        "How do I boil an egg?",
        "Boil water. Затем осторожно опустите яйцо в воду и варите семь минут. Cool it.",
    ),
    ("How do I boil an egg?", "Put it in 水 for 七分钟, then 冷却 it and peel."),
    ("How do I boil an egg?", "먼저 물을 끓이고 계란을 넣은 다음 7분 정도 기다리세요."),
    (
        "How do I boil an egg?",
        "Boil for seven minutes. これで美味しいゆで卵が出来上がります。 Enjoy.",
    ),
    (
        "How do I boil an egg?",
        "<think>\nThe user wants a recipe, so a short list is best.\n</think>\n"
        "Сварите яйцо семь минут.",
    ),
    (
        FIND,
        "<think>\n好的，我现在需要解决这个问题。\n"
        "首先，n^2 + 1 除以 n + 1。\n</think>\n\\boxed{0, 1, -2, -3}",
    ),
    (
        FIND,
        "<think>\nOkay, n + 1 divides 2.\n"
        "嗯，让我再检查一遍，看看有没有漏掉的情况。\n</think>\n\\boxed{1}",
    ),
    (FIND, ("So we get 2 mod n + 1, as before. " * 300) + "\n综上所述，满足条件的整数共有四个。\n"),
    (FIND, "Case 1: n = 0 时, 成立. Case 2: n = 1 时, 也成立. 其他 cases fail."),
    (FIND, "Since n ≡ -1, получаем n² + 1 ≡ 2, значит n + 1 делит 2. Done."),
    (FIND, "Hmm, 等一下, n + 1 could be negative. 所以 n = -2 也可以, and -3."),
    (FIND, "\\text{因为} n+1 \\mid 2, \\text{所以} n+1 = \\pm 1, \\pm 2, \\text{从而得到四个解}."),
    (
        FIND,
        "Dividing gives 2, vậy n + 1 chia hết 2, và do đó có bốn nghiệm.",
    ),  # Latin letters: missed
    (FIND, "Dividing gives 2, donc n + 1 divise 2, et il y a quatre solutions."),  # missed
    (
        FIND,
        ("The case is clear. " * 50) + "其实 we can stop here." + (" So it is. " * 50),
    ),  # missed
    (
        SUM,
        "<think>\nfor loop 循环 n 次, 每次读取一个数, 加到 total 上.\n"
        "</think>\n```python\nprint(0)\n```",
    ),
    (SUM, "<think>\nРешим задачу: прочитаем n, затем n чисел, и выведем сумму.\n</think>\nok"),
    (SUM, "We need an array, массив из n элементов, затем цикл по всем элементам массива."),
    (SUM, "Use a loop; 注意: overflow. 使用 long long. 时间复杂度 O(n)."),
    (SUM, "الحل بسيط: نقرأ n ثم نجمع الأعداد."),
    (SUM, "# plan\n- read n\n- 读取数字并且累加到变量之中去\n- print"),
    (WHO, "The author is 托尔斯泰, a 俄国 writer of the 十九世纪."),
    (
        WHO,
        "Tolstoy wrote it between 1863 and 1869, "
        "і це один із найвідоміших романів у світовій літературі.",
    ),
    (WHO, "लियो टॉल्स्टॉय ने यह उपन्यास लिखा था, and it is long."),
    (WHO, "It's by Leo Tolstoy. 希望这个回答对你有帮助！如果还有问题，请随时告诉我。"),
    (
        "Plan a weekend in Rome.",
        "Day 1: the Forum. Day 2: 参观梵蒂冈博物馆和西斯廷教堂，下午去特雷维喷泉。",
    ),
    (
        "Plan a weekend in Rome.",
        "Saturday: Colosseum, Forum, Trevi. Sunday: Ватикан, музей и прогулка вдоль реки Тибр.",
    ),
    (
        "Plan a weekend in Rome.",
        "Saturday: コロッセオとフォロ・ロマーノを見学します。Sunday: the Vatican.",
    ),
    (
        "Plan a weekend in Rome.",
        "1. Colosseum 斗兽场\n2. Forum 广场\n3. Vatican 梵蒂冈\n4. Trevi 许愿池",
    ),
    (
        "Write an email to my landlord.",
        "Dear Sir, the heating is broken. Пожалуйста, пришлите мастера как можно скорее. Best, A.",
    ),
    ("Write an email to my landlord.", "尊敬的房东：\n暖气坏了，请尽快修理。\n谢谢"),
    (
        "Write an email to my landlord.",
        "Dear landlord, the 暖气 is 坏了. Please 尽快 send someone. 谢谢.",
    ),
    ("Why is the sky blue?", "Because of Rayleigh scattering, 即短波长的光散射得更强。"),
    (
        "Why is the sky blue?",
        "Rayleigh scattering: ตามกฎของเรย์ลี แสงสีน้ำเงินกระเจิงมากกว่าแสงสีแดง.",
    ),
    (
        "Why is the sky blue?",
        "Wegen der Streuung des Lichts, which is stronger for short waves.",
    ),  # missed
    (
        "Why is the sky blue?",
        "Blue light is scattered more (短波长的光比长波长的光散射得更强烈，这就是原因).",
    ),
    ("Sum up the plot of Hamlet.", "A prince avenges his father. 最后，几乎所有的主要角色都死了。"),
]


def counts(honest, mixed):
    """(honest ones that are kept, honest ones refused, mixed ones caught, mixed ones missed)."""
    refused = [pair for pair in honest if not language_ok(*pair)]
    missed = [pair for pair in mixed if language_ok(*pair)]
    return len(honest) - len(refused), refused, len(mixed) - len(missed), missed


@pytest.mark.parametrize(
    "honest, mixed, known", [(HONEST, MIXED, True), (HONEST_UNSEEN, MIXED_UNSEEN, False)]
)
def test_precision_and_recall_on_sentences_of_our_own(honest, mixed, known):
    """All of the known ones; of the unseen ones all but three honest ones and four mixed ones."""
    kept, refused, caught, missed = counts(honest, mixed)
    precision = caught / (caught + len(refused))
    recall = caught / len(mixed)
    print(
        f"{'known' if known else 'unseen'}: {kept} of {len(honest)} honest ones are kept, "
        f"{caught} of {len(mixed)} mixed ones are caught: "
        f"precision {precision:.2f}, recall {recall:.2f}"
    )
    for prompt, response in (*refused, *missed):
        print(f"  wrong: {prompt[:50]} -> {response[-80:]}")
    assert len(honest) >= 40 and len(mixed) >= 40
    assert len(refused) <= (0 if known else 3) and len(missed) <= (0 if known else 4)


def test_a_word_that_only_looks_like_a_language_excuses_nothing():
    drift = "Let me see. 现在我们来验证一下这个结论是否正确。"
    for prompt in (
        "Arabella is 8 years old. How old is she in 10 years?",
        "Russell has 7 apples, Orion has 3.",
        "Translate the graph of y = x^2 by 3 units.",
        "Write a script in your favourite programming language.",
        "Which programming languages have no garbage collector?",
        "Print the letters of the English alphabet.",
        "The jeweler sells rings in Indiana.",
    ):
        assert not language_ok(prompt, drift), prompt


def test_reasoning_about_words_of_another_language_costs_math_and_code_nothing():
    asked = "Write a program that prints the Chinese numeral of a digit."
    plan = "<think>The digits are 零 一 二 三 四 五 六 七 八 九, so a table will do.</think>"
    greeting = '<think>So print("你好") for an even n, else print("再见").</think>'
    tests = {"inputs": ["1\n"], "outputs": ["1\n"], "fn_name": None, "time_limit": None}
    program = "\n```python\nprint(input())\n```"
    assert coderl.verdict(plan + program, tests, asked)[:2] == (1, "ok")
    assert coderl.verdict(greeting + program, tests, SUM)[:2] == (1, "ok")
    inequality = "<think>By Чебышёв's inequality (неравенство Чебышёва) it is 2.</think>\\boxed{2}"
    assert mathrl.verdict(inequality, "2", FIND) == (1, "ok")
    drift = "<think>It is even. 现在我们来验证一下这个结论是否正确。</think>"
    assert coderl.verdict(drift + program, tests, SUM)[:2] == (0, "language")
    assert mathrl.verdict(drift + "\\boxed{2}", "2", FIND) == (-1, "language")


def test_thought_and_answer_are_judged_each_by_itself():
    thought = "<think>" + "The user says hi, so I greet back. " * 100 + "</think>"
    assert language_ok("Hi", thought + "Hello!") and not language_ok("Hi", thought + "你好")
    assert not language_ok("Hi", "<think>用户说你好，所以我也要打招呼。</think>" + "Hello! " * 100)


def test_quotes_and_code_are_no_hiding_place():
    sentence = "现在我们来验证一下这个结论是否正确"
    for form in ("“{}”", '"{}"', "`{}`", "({})", "**{}**", "```\n{}\n```", "> {}\n"):
        assert language_ok(
            "Is it so?", f"It is so, as the old book has it: {form.format('天下為公')}"
        )
        assert not language_ok("Is it so?", "So: " + "\n".join([form.format(sentence)] * 20)), form


def test_a_verdict_takes_milliseconds_whatever_the_text():
    """A response has at most some 200 KB, four times as much as these; the cost is linear."""
    draw = random.Random(0)
    noise = "".join(draw.choice("\"'`(|*>[ \n“«「ab好") for _ in range(25_000))
    texts = {
        "English": "So the answer is 4. " * 2500,
        "mathematics": "So α ≤ 4 — naïve. " * 2700,
        "Chinese": "现在我们来验证一下这个结论是否正确。" * 900,
        "named": "in Chinese 好 x " * 3200,
        "different": "".join(f"China {chr(0x4E00 + i)} xx " for i in range(3700)),
        "noise": noise,
        **{mark: mark * 25_000 + "好" for mark in "\"'`([*>|«“「 \n"},
    }
    seconds = {}
    for name, text in texts.items():
        start = time.process_time()
        language_ok(FIND, text)
        seconds[name] = time.process_time() - start
    slowest = max(seconds, key=seconds.get)
    print(f"slowest: {slowest!r}, {1e3 * seconds[slowest]:.0f} ms of CPU (limit 500)")
    assert seconds[slowest] < 0.5


def test_a_prompt_that_is_not_english_leaves_the_reply_alone():
    """The paper punishes other languages "when the prompt is purely in English" (4.3.2). A Chinese
    prompt is not, whatever script the reply is in; the same reply to an English one is mixed."""
    chinese = "\u8bf7\u89e3\u91ca\u4e00\u4e0b\u96e8\u662f\u600e\u4e48\u6765\u7684"
    russian = "\u0414\u043e\u0436\u0434\u044c \u044d\u0442\u043e \u0432\u043e\u0434\u0430"
    assert language_ok(chinese, russian)
    assert not language_ok("Explain where rain comes from.", russian)
