"""Generated sentences in fourteen languages, for tokenizers that need more multilingual text than is written.

Each language has counted things (``x``, in the form that follows a number), predicates (``v``, after a person) and
sentence patterns. Numbers avoid the endings 1 to 4, so that the Slavic forms agree.
"""

# Letters of other scripts look "ambiguous" to the linter, and wide ones count twice in its line length.
# ruff: noqa: RUF001, E501

from __future__ import annotations

import random
from dataclasses import dataclass

from exl2ray.calibration.generate import words


@dataclass(frozen=True)
class Language:
    patterns: tuple[str, ...]
    things: tuple[str, ...]
    predicates: tuple[str, ...]
    people: tuple[str, ...] = ()  # default: Latin names
    places: tuple[str, ...] = ()
    space: str = " "  # between sentences


def _list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split("|"))


GERMAN = Language(
    _list("""Am {d} zählte {a} in {p} {n} {x} und {n} {x}.|{a} {v}, aber {a} {v}.|Von {n} {x} sind {n} alt, sagt {a}.
|Um {t} fehlten in {p} {n} {x}.|Kosten {x} in {p} {n} Euro, {x} aber {n}?|Wer {x} sucht, findet {x}; {a} {v}.
|Bis {p} sind es {n} km, und {a} {v}.|{n} {x}, {n} {x}, keine {x}: {a} {v}."""),
    _list("""Schrauben|Briefe|Äpfel|Lampen|Karten|Fenster|Stühle|Bücher|Flaschen|Räder|Steine|Kisten|Uhren|Seile|Töpfe
|Nägel|Hefte|Brücken|Zelte|Löffel"""),
    _list("""wartet am Tor|kommt heute später|kennt den Weg|schweigt lieber|hat es geahnt|repariert das Dach|lacht darüber
|bleibt noch eine Woche|schreibt alles auf|glaubt kein Wort|fährt mit dem Zug|spart seit Jahren"""),
)
FRENCH = Language(
    _list("""Le {d}, {a} a compté {n} {x} et {n} {x} à {p}.|{a} {v}, mais {a} {v}.|Sur {n} {x}, {n} sont à {p}.
|À {t}, il manquait {n} {x}.|Pourquoi {n} euros pour {n} {x} à {p}, et {n} pour dix {x} ?|Ni {x} ni {x} : {a} {v}.
|De {p} à {p} il y a {n} km ; {a} {v}.|{n} {x}, {n} {x}, puis rien, dit {a}."""),
    _list("""lettres|pommes|lampes|cartes|fenêtres|chaises|livres|bouteilles|roues|pierres|caisses|montres|cordes|clous
|cahiers|ponts|tentes|cuillères|bougies|outils"""),
    _list("""attend près du pont|arrivera demain|connaît la route|préfère se taire|répare le toit|en rit encore|reste une
semaine|note tout|n'en croit rien|prend le train|économise depuis longtemps|a tout deviné"""),
)
SPANISH = Language(
    _list("""El {d}, {a} contó {n} {x} y {n} {x} en {p}.|{a} {v}, pero {a} {v}.|De {n} {x}, {n} están en {p}.
|A las {t} faltaban {n} {x}.|¿Por qué {n} {x} cuestan {n} euros en {p} y diez {x} solo {n}?|Ni {x} ni {x}: {a} {v}.
|Entre {p} y {p} hay {n} km; {a} {v}.|{n} {x}, {n} {x} y nada más, dice {a}."""),
    _list("""cartas|manzanas|lámparas|tarjetas|ventanas|sillas|libros|botellas|ruedas|piedras|cajas|relojes|cuerdas|clavos
|cuadernos|puentes|tiendas|cucharas|velas|herramientas"""),
    _list("""espera junto al puente|llegará mañana|conoce el camino|prefiere callar|arregla el tejado|todavía se ríe|se
queda otra semana|lo apunta todo|no cree nada|viaja en tren|ahorra desde hace años|ya lo sabía"""),
)
ITALIAN = Language(
    _list("""Il {d} {a} ha contato {n} {x} e {n} {x} a {p}.|{a} {v}, ma {a} {v}.|Su {n} {x}, {n} sono a {p}.
|Alle {t} mancavano {n} {x}.|Perché {n} {x} costano {n} euro a {p} e dieci {x} soltanto {n}?|Né {x} né {x}: {a} {v}.
|Da {p} a {p} sono {n} km; {a} {v}.|{n} {x}, {n} {x} e basta, dice {a}."""),
    _list("""lettere|mele|lampade|carte|finestre|sedie|libri|bottiglie|ruote|pietre|casse|orologi|corde|chiodi|quaderni
|ponti|tende|cucchiai|candele|chiavi"""),
    _list("""aspetta al cancello|arriva domani|conosce la strada|preferisce tacere|ripara il tetto|ne ride ancora|resta una
settimana|annota tutto|non ci crede|viaggia in treno|risparmia da anni|lo sapeva già"""),
)
PORTUGUESE = Language(
    _list("""Em {d}, {a} contou {n} {x} e {n} {x} em {p}.|{a} {v}, mas {a} {v}.|De {n} {x}, {n} estão em {p}.
|Às {t} faltavam {n} {x}.|Por que {n} {x} custam {n} euros em {p} e dez {x} apenas {n}?|Nem {x} nem {x}: {a} {v}.
|De {p} até {p} são {n} km; {a} {v}.|{n} {x}, {n} {x} e mais nada, diz {a}."""),
    _list("""cartas|maçãs|lâmpadas|fichas|janelas|cadeiras|livros|garrafas|rodas|pedras|caixas|relógios|cordas|pregos
|cadernos|pontes|tendas|colheres|velas|chaves"""),
    _list("""espera perto da ponte|chega amanhã|conhece o caminho|prefere calar|conserta o telhado|ainda ri disso|fica mais
uma semana|anota tudo|não acredita|viaja de comboio|poupa há anos|já sabia"""),
)
DUTCH = Language(
    _list("""Op {d} telde {a} in {p} {n} {x} en {n} {x}.|{a} {v}, maar {a} {v}.|Van de {n} {x} zijn er {n} in {p}.
|Om {t} ontbraken nog {n} {x}.|Waarom kosten {x} in {p} {n} euro en {x} maar {n}?|Geen {x}, geen {x}: {a} {v}.
|Van {p} naar {p} is het {n} km; {a} {v}.|{n} {x}, {n} {x}, meer niet, zegt {a}."""),
    _list("""brieven|appels|lampen|kaarten|ramen|stoelen|boeken|flessen|wielen|stenen|kisten|klokken|touwen|spijkers
|schriften|bruggen|tenten|lepels|kaarsen|sleutels"""),
    _list("""wacht bij de poort|komt morgen pas|kent de weg|zwijgt liever|maakt het dak|lacht er nog om|blijft een week|schrijft
alles op|gelooft er niets van|neemt de trein|spaart al jaren|wist het al"""),
)
POLISH = Language(
    _list("""{d} w mieście {p}: {a} widzi {n} {x} i {n} {x}.|{a} {v}, ale {a} {v}.|Z {n} {x} zostało {n}.
|O {t} brakowało {n} {x}.|Dlaczego {n} {x} kosztuje {n} zł, a {n} {x} tylko {n}?|Ani {x}, ani {x}: {a} {v}.
|Do {p} jest {n} km, a {a} {v}.|{n} {x}, {n} {x} i nic więcej, mówi {a}."""),
    _list("""listów|jabłek|lamp|kart|okien|krzeseł|książek|butelek|kół|kamieni|skrzyń|zegarów|lin|gwoździ|zeszytów|mostów
|namiotów|łyżek|świec|kluczy"""),
    _list("""czeka przy bramie|przyjdzie jutro|zna drogę|woli milczeć|naprawia dach|jeszcze się śmieje|zostaje na tydzień
|wszystko zapisuje|w to nie wierzy|jedzie pociągiem|oszczędza od lat|już to wie"""),
)
RUSSIAN = Language(
    _list("""{d}, {p}: у нас {n} {x} и {n} {x}.|{a} {v}, но {a} {v}.|Из {n} {x} осталось {n}.
|В {t} не хватало {n} {x}.|Почему {n} {x} стоят {n} рублей, а {n} {x} всего {n}?|Ни {x}, ни {x}: {a} {v}.
|До города {p} {n} км, а {a} {v}.|{n} {x}, {n} {x} и больше ничего, пишет {a}."""),
    _list("""писем|яблок|ламп|карт|окон|стульев|книг|бутылок|колёс|камней|ящиков|часов|верёвок|гвоздей|тетрадей|мостов
|палаток|ложек|свечей|ключей"""),
    _list("""ждёт у ворот|придёт завтра|знает дорогу|молчит|чинит крышу|ещё смеётся|остаётся на неделю|всё записывает|этому не
верит|едет поездом|давно копит деньги|уже догадывается"""),
    _list("Анна|Борис|Вера|Глеб|Дарья|Егор|Зоя|Иван|Ксения|Лев|Мария|Никита|Ольга|Павел|Софья|Тимур"),
    _list("Вологда|Елец|Кунгур|Муром|Псков|Суздаль|Тотьма|Углич|Шуя|Ялта"),
)
TURKISH = Language(
    _list("""{d} günü {p} pazarında {n} {x} ve {n} {x} vardı.|{a} {v}, ama {a} {v}.|{n} {x} içinden {n} tanesi {p} için.
|Saat {t}: {n} {x} eksik.|{p} pazarında {n} {x} neden {n} lira, {n} {x} ise {n}?|Ne {x} ne {x}: {a} {v}.
|{p} ile {p} arası {n} km; {a} {v}.|{n} {x}, {n} {x}, başka yok, diyor {a}."""),
    _list("""mektup|elma|lamba|kart|pencere|sandalye|kitap|şişe|tekerlek|taş|sandık|saat|ip|çivi|defter|köprü|çadır|kaşık|mum
|anahtar"""),
    _list("""kapıda bekliyor|yarın gelecek|yolu biliyor|susmayı seçti|çatıyı onarıyor|hâlâ gülüyor|bir hafta kalıyor|her şeyi
yazıyor|buna inanmıyor|trenle gidiyor|yıllardır biriktiriyor|çoktan anladı"""),
)
CHINESE = Language(
    _list("""{d}，{a}在{p}数了{n}件{x}和{n}件{x}。|{a}{v}，可是{a}{v}。|{n}件{x}里有{n}件送到{p}。|{t}还缺{n}件{x}。
|为什么{p}的{x}卖{n}元，{x}只卖{n}元？|没有{x}，也没有{x}，{a}{v}。|从{p}到{p}有{n}公里，{a}{v}。
|{x}{n}件，{x}{n}件，{a}说就这些。"""),
    _list("信件|苹果|灯具|地图|窗框|椅子|书籍|瓶子|车轮|石雕|木箱|钟表|绳索|钉子|本子|帐篷|勺子|蜡烛|钥匙|雨伞"),
    _list("""在门口等着|明天才到|认得这条路|不想说话|正在修屋顶|还在笑|要再住一周|把什么都记下来|一点也不信|坐火车去|存了好几年
|早就猜到了"""),
    _list("李明|王芳|张伟|刘洋|陈静|杨帆|赵磊|黄丽|周涛|吴敏|徐强|孙悦"),
    _list("杭州|洛阳|大理|泉州|兰州|桂林|徐州|青岛|宜昌|开封"),
    space="",
)
JAPANESE = Language(
    _list("""{d}、{a}は{p}で{x}を{n}個、{x}を{n}個数えた。|{a}は{v}が、{a}は{v}。|{x}{n}個のうち{n}個は{p}行きだ。
|{t}には{x}が{n}個足りなかった。|なぜ{p}では{x}が{n}円で、{x}は{n}円なのか。|{x}も{x}もない。{a}は{v}。
|{p}から{p}まで{n}キロあり、{a}は{v}。|{x}が{n}個、{x}が{n}個、と{a}は言う。"""),
    _list("手紙|りんご|ランプ|地図|窓枠|椅子|本|瓶|車輪|石|木箱|時計|ロープ|釘|ノート|テント|スプーン|ろうそく|鍵|傘"),
    _list("""門の前で待つ|明日来る|道を知っている|黙っている|屋根を直す|まだ笑っている|もう一週間いる|全部書き留める|信じていない
|電車で行く|何年も貯金している|もう気づいていた"""),
    _list("健二|直子|大輔|美咲|拓也|由美|誠|千尋|翔太|真由|亮|恵子"),
    _list("松本|金沢|倉敷|函館|尾道|高山|長崎|弘前|松山|奈良"),
    space="",
)
KOREAN = Language(
    _list("""{d}, {p}에는 {x} {n}개와 {x} {n}개가 있었다.|{a} 씨는 {v}, {a} 씨는 {v}.|{x} {n}개 중 {n}개는 {p}행이다.
|{t}에 {x} {n}개가 모자랐다.|왜 {p}에서 {x} 값은 {n}원, {x} 값은 {n}원일까?|{x}도 {x}도 없다. {a} 씨는 {v}.
|{p}에서 {p}까지 {n}킬로미터, {a} 씨는 {v}.|{x} {n}개, {x} {n}개뿐이라고 {a} 씨가 말한다."""),
    _list("편지|사과|램프|지도|창문|의자|책|병|바퀴|돌|상자|시계|밧줄|못|공책|천막|숟가락|양초|열쇠|우산"),
    _list("""문 앞에서 기다린다|내일 온다|길을 안다|말이 없다|지붕을 고친다|아직 웃는다|한 주 더 머문다|모두 적어 둔다|믿지 않는다
|기차로 간다|몇 년째 저축한다|이미 알고 있었다"""),
    _list("민준|서연|도윤|지우|하준|수빈|예준|지민|현우|은서|태양|가온"),
    _list("강릉|전주|통영|안동|목포|춘천|여수|공주|속초|군산"),
)
ARABIC = Language(
    _list("""في {d} كان عدد {x} في {p} {n} وعدد {x} {n}.|{a}: {v}، لكن {a}: {v}.|عدد {x}: {n}، منها {n} في {p}.
|في الساعة {t} كان ينقصنا {n} من {x}.|لماذا سعر {x} في {p} {n}، وسعر {x} {n} فقط؟|لا {x} ولا {x}، {a}: {v}.
|المسافة من {p} إلى {p} هي {n} كم، {a}: {v}.|{n} من {x} و{n} من {x}، هذا كل شيء عند {a}."""),
    _list("""الرسائل|التفاح|المصابيح|البطاقات|النوافذ|الكراسي|الكتب|الزجاجات|العجلات|الأحجار|الصناديق|الساعات|الحبال|المسامير
|الدفاتر|الجسور|الخيام|الملاعق|الشموع|المفاتيح"""),
    _list("""ننتظر عند الباب|سنصل غدا|نعرف الطريق|نفضل الصمت|نصلح السقف|ما زلنا نضحك|نبقى أسبوعا آخر|نكتب كل شيء|لا نصدق ذلك
|نسافر بالقطار|ندخر منذ سنوات|كنا نعلم ذلك"""),
    _list("أحمد|ليلى|سامر|نور|خالد|هدى|يوسف|مريم|طارق|سلمى|باسم|رنا"),
    _list("حلب|فاس|طنجة|أسوان|مسقط|نابلس|صفاقس|بصرى|عدن|وهران"),
)
HINDI = Language(
    _list("""{d} को {p} में {x}: {n}, और {x}: {n}।|{a} ने कहा: {v}, पर {a} ने कहा: {v}।|कुल {n} {x} में से {n} {p} के लिए।
|{t} बजे तक {n} {x} कम थे।|{p} में {x} का दाम {n} और {x} का केवल {n} क्यों?|न {x}, न {x}; {a} ने कहा: {v}।
|{p} से {p} तक {n} किमी, और {a} ने कहा: {v}।|{n} {x}, {n} {x}, बस इतना ही, {a} ने लिखा।"""),
    _list("पत्र|सेब|दीपक|कार्ड|दरवाज़े|मेज़|बर्तन|डिब्बे|पहिए|पत्थर|संदूक|घर|धागे|नट|पन्ने|पुल|तंबू|चम्मच|काग़ज़|ताले"),
    _list("""हम फाटक पर हैं|हम कल आएँगे|रास्ता मालूम है|चुप रहना ठीक है|छत ठीक करनी है|अब भी हँसी आती है|एक हफ़्ता और रुकेंगे
|सब लिख लिया है|यक़ीन नहीं होता|रेल से जाना है|बरसों से बचत है|यह तो पता था"""),
    _list("अनिल|सुनीता|रवि|मीना|अमित|कविता|विजय|पूजा|मोहन|गीता|राहुल|नेहा"),
    _list("उदयपुर|मैसूर|वाराणसी|नासिक|पटना|भोपाल|मदुरै|अमृतसर|पुणे|रांची"),
)
LANGUAGES = (
    GERMAN, FRENCH, SPANISH, ITALIAN, PORTUGUESE, DUTCH, POLISH,
    RUSSIAN, TURKISH, CHINESE, JAPANESE, KOREAN, ARABIC, HINDI,
)  # fmt: skip


def passage(rng: random.Random) -> str:
    """One to three paragraphs in one language."""
    language = rng.choice(LANGUAGES)
    paragraphs = []
    for _ in range(rng.randint(1, 3)):
        patterns = rng.sample(language.patterns, rng.randint(3, 7))
        paragraphs.append(language.space.join(_fill(p, language, rng) for p in patterns))
    return "\n\n".join(paragraphs) + "\n"


def _fill(pattern: str, language: Language, rng: random.Random) -> str:
    slots = {
        "a": lambda: rng.choice(language.people or words.GIVEN),
        "p": lambda: rng.choice(language.places) if language.places else words.place(rng),
        "x": lambda: rng.choice(language.things),
        "v": lambda: rng.choice(language.predicates),
        "n": lambda: str(10 * rng.randint(0, 60) + rng.randint(5, 9)),
        "t": lambda: words.clock(rng),
        "d": lambda: f"{rng.randint(1, 28)}.{rng.randint(1, 12)}.{rng.randint(1890, 2031)}",
    }
    # Line breaks inside the lists above are layout only.
    text = words.SLOT.sub(lambda m: slots[m[1]](), " ".join(pattern.split()))
    text = " ".join(text.split())
    return text[0].upper() + text[1:]
