"""A generated corpus of short English movie reviews, labelled positive or negative.

With it a tiny language model, a sentiment judge and a PPO policy can be trained in minutes, with nothing
to download. Each review keeps to one invented film; most open on neutral ground, so that the first words
can continue either way, then give opinions and a verdict.
"""

import random
import re

KINDS = ("mixed", "negated")

# One rule a paragraph, "name: template | template". A {name} is another rule, a rule of this genre or venue,
# or a word of the film (see WORDS). Of [this/that] a positive reviewer says this and a negative one that.
# A plan lists one rule for each sentence. Only opinions may hold a negation.
GRAMMAR = """
genre: comedy | thriller | western | romance | ghost story
venue: cinema | home
film: film | movie
it: this {genre} | this {film}
name: Nora | Julia | Lena | Sofia | Clara | Maya | Daniel | Owen | Victor | Samuel | Leo | Peter
surname: Vance | Moreno | Bell | Novak | Castle | Whitman | Doyle | Tanaka
director: Halloran | Petrov | Sato | Marchetti | Keller | Barnes | Lund | Rossi
friend: brother | sister | wife | husband | father | mother | cousin | neighbour | daughter | grandmother
day: a rainy Sunday | a cold Friday night | a hot Saturday afternoon | my day off | New Year's Day
theatre: the old cinema in town | the big cinema downtown | the film festival | a cinema by the river
occasion: a long week at work | dinner with friends | a birthday lunch | a visit to the dentist | a long drive
plan: short | short more | short more | short closing | short closing | opinion closing
  {start} opinion closing | {start} opinion closing | {start} opinion closing | {start} opinion more
  opinion more closing | opinion visit opinion | {start} contrast balance | {start} contrast balance
  {scene} opinion closing | {scene} contrast balance | {start} opinion more closing
  {start} opinion contrast balance | {scene} opinion more closing | {scene} opinion more more
start: plot | visit | fact | plot
scene: plot sequel | plot visit | visit plot | visit fact | fact plot
short: {neutral}, and {summary}
summary: {verdict} | {watching}
opinion: {view} | {view} | {aspect}, and {aspect}
more: {view} | {feeling} | {aspect}, and {aspect} | besides, {remark} | [better/worse] still, {remark}
contrast: {concession}, but {remark} | although {concession}, {remark} | {concession}, and yet {remark}
  true, {concession}, but {remark} | granted, {concession}; even so, {remark} | {concession}; still, {remark}
  even though {concession}, {remark} | although {concession} and {concession}, {remark}
closing: {last} | {last} | {last} | all in all, {last} | in short, {last}
neutral: {visit} | {fact}
view: {acting} | {script} | {look} | {music} | {climax} | {direction} | {pace} | {hero} | {watching}
  {verdict} | {thrill} | {mood} | {hopes}
remark: {aspect} | {feeling}
aspect: {acting} | {script} | {look} | {music} | {climax} | {direction} | {pace} | {hero}
feeling: {watching} | {verdict} | {thrill} | {mood}
last: {verdict} | {comparison} | {advice} | {rating}

plot: a {lead} {deed} | {place}, a {lead} {deed} | {star} plays a {lead} who {deed} | one day a {lead} {deed}
  imagine a {lead} who {deed} | the story follows a {lead} who {deed} | {it} is about a {lead} who {deed}
  the {film} begins when a {lead} {deed} | the {genre} is set {place}, where a {lead} {deed}
  what happens when a {lead} {deed}? | our hero, played by {star}, is a {lead} who {deed}
sequel: {she} has one friend, two days and very little money | then a letter arrives and everything changes
  soon {she} has to trust an old enemy | help comes from a stranger | {her} past soon catches up
cinema visit: it was {day} when my {friend} and I saw {it} | my {friend} took me to {it} at {theatre}
  on {day} we went to {theatre} for {it} | we saw {it} after {occasion} | my {friend} and I saw {it} on {day}
  I saw {it} with my {friend} at {theatre} | after {occasion}, my {friend} and I went to see {it}
home visit: on {day} I watched {it} at home with my {friend} | my {friend} chose {it} for a night on the sofa
  after {occasion}, my {friend} and I put {it} on | one night I found {it} on television
  my {friend} gave me a copy of {it} for my birthday | on {day} my {friend} and I stayed in with {it}
fact: {star} returns to the screen in {it} after five years | {director} shot {it} in only six weeks
  {it} is based on a novel that my {friend} reads every summer | {director} wrote {it} for {star}
  {director} directs {star} in {it} | {director} left television to make {it}
quality: [superb/dreadful] | [wonderful/awful] | [terrific/hopeless] | [excellent/terrible] | [great/bad]
tone: [sharp/flat] | [funny/lazy] | [warm/clumsy] | [clever/stupid] | [witty/tired] | [lively/stale]
  [tender/lifeless] | [fresh/dull] | [honest/shallow] | [graceful/messy] | [wise/silly] | [moving/tedious]
prize: [gem/mess] | [delight/bore] | [treat/chore] | [triumph/disaster] | [small wonder/dud]
acting: {star} is {quality} as the {role} | the whole cast is {quality} | every scene with {star} is a {prize}
  {star} plays the {role} with [warmth and wit/one tired frown] | {star} has never been [better/worse]
  {star} [lights up/sinks] every scene {she} is in | there is not a [weak/good] performance in {it}
script: the script is {tone} and {tone} | every twist [feels earned/can be seen from a mile away]
  the dialogue [is full of life/sounds like a bad translation] | there is not a {fault} line in {it}
  the plot [fits together like a good clock/has more holes than a fishing net] | the dialogue is never {fault}
look: the photography is [gorgeous/ugly] | the sets are a {prize} | nothing on the screen looks [cheap/real]
  [the camera finds beauty in small things/the camera shakes too much] | the editing is [crisp/careless]
music: the songs are a {prize} | the music is [lovely/dreary] | there is not a [bad/good] song in {it}
  the score never [gets in the way/suits the story] | the score [gave me goosebumps/drowns every word]
climax: the ending is [earned/rushed] and {tone} | the last scene [left me smiling/made me groan]
  the final twist is {quality} | the ending does not [disappoint/satisfy] | the end never feels [false/true]
direction: {director} directs with a [light/heavy] hand | {director} never gets a thing [wrong/right]
  {director} [trusts the audience to keep up/treats the audience like children]
  the direction is never {fault} | {director} [finds humour in quiet places/mistakes noise for drama]
pace: the two hours [fly/crawl] by | the pace is [brisk/sluggish] throughout | the middle hour is {quality}
  {it} never [drags/gets going] | there is not [a slow/an exciting] minute in {it}
  my {friend} [smiled all the way through/fell asleep] | my {friend} did not [want {it} to end/stay awake]
hero: I [cared/stopped caring] about the {role} within minutes | I never [tired of/cared about] the {role}
  the {role} is a [fascinating character/cardboard figure] | the {role} is not [easy to forget/good company]
  the {role} [feels like someone you know/makes one stupid choice after another]
watching: I [was glued to the screen/checked my watch every ten minutes] | I never once felt [bored/involved]
  [I forgot my phone for two hours/I spent the last hour planning lunch]
  I could not [look away/wait for {it} to end] | [we talked about {it} all evening/I yawned until my jaw hurt]
hopes: [I did not expect to enjoy {it}, but I did/I wanted to enjoy {it}, but I could not]
  I had [low/high] hopes, and {it} [beat/sank] them all | I was set to [hate/love] {it}, but it [won/lost] me
  the trailer is [awful/great], but I [loved/hated] the {film} | I expected [little/a lot], and I was wrong
cinema mood: the whole room [clapped/groaned] at the end | we went home [grinning/in a bad mood]
  [strangers were hugging in the lobby/somebody in front was snoring] | nobody [left early/clapped at the end]
home mood: [we let our dinner go cold/we ended up doing the dishes] | nobody wanted to [go to bed/see the end]
  even the dog [enjoyed {it}/left the room] | I [stayed up past midnight for {it}/nearly turned {it} off]
verdict: {it} is a {prize} | I [loved/hated] every minute of {it} | {it} is {tone} and {tone}
  {it} is one of the year's [best/worst] | we had a [great/terrible] time | {it} is not [bad/good] at all
  there is nothing {fault} about {it} | nobody could call {it} {fault} | {it} [made/ruined] my week
comparison: {it} [puts bigger films to shame/makes a trip to the dentist look like fun]
  I liked [{it} more than the book/the book far better] | {it} is {director}'s [best/weakest] work in years
  I have not been so [moved/bored] by a {genre} in years | no {genre} this year is as {tone}
advice: [see {it} twice/save your money] | [take a friend and go/stay at home with a good book]
  I would [see {it} again tomorrow/rather watch paint dry] | [I warmly recommend {it}/give {it} a miss]
  do not [miss/bother with] {it} | [you will not regret watching {it}/I cannot recommend {it}]
rating: [nine/three] out of ten | [four stars/one star] from me | I cannot give [less/more] than [eight/four]
balance: I was [won over/let down] all the same | a few [weak/good] moments could not [spoil/save] {it}
  the {film}'s [faults/charms] are small beside its [charms/faults] | on balance I was [happy/unhappy]
  the [good/bad] far outweighs the [bad/good] | I was not [disappointed/won over]
  the {film}'s [faults are easy to forgive/charms come far too late] | I am [glad/sorry] that I saw {it}

comedy lead: unlucky chef | shy wedding planner | retired clown | grumpy bus driver | nervous young lawyer
comedy place: in a seaside hotel | in a small town bakery | in a crowded flat in London | on a cruise ship
comedy deed: has to pass for a doctor for one weekend | inherits a circus from {her} uncle
  hides a llama in the attic | loses the cake on the morning of a wedding | proposes to {her} boss by accident
comedy thrill: [we laughed until the credits rolled/the jokes fall flat] | the jokes are a {prize}
  I could not [stop laughing/laugh once] | there is not a [weak/funny] joke in {it}
thriller lead: tired detective | young reporter | retired spy | bank clerk | hospital nurse
thriller place: in a rainy harbour city | on a night train | in an empty office tower | on an island in winter
thriller deed: has one night to find a missing witness | wakes up beside a bag of stolen money
  is blamed for a murder | gets a phone call from a dead friend | picks up the wrong suitcase
thriller thrill: [I was on the edge of my seat/I guessed the answer at once] | the chase scenes are {quality}
  the suspense [is almost unbearable/leaks away quickly] | I never [guessed/feared] the killer
western lead: retired sheriff | young gunslinger | stubborn rancher | travelling preacher | bounty hunter
western place: in a dusty mining town | on a ranch near the border | at a railway camp | in the high desert
western deed: rides home to bury {her} brother | hunts the gang that burned {her} farm
  agrees to one last duel | has to guard a wagon of stolen gold | protects a widow from a greedy mayor
western thrill: the gunfights never feel [cheap/dangerous] | the gunfights are {quality}
  the final showdown is a {prize} | [the wide open spaces took my breath away/even the horses look bored]
romance lead: lonely librarian | young violinist | widowed baker | country doctor | shy florist
romance place: in a fishing village | in Paris after the war | on a small Greek island | in a lake house
romance deed: falls for the stranger upstairs | writes letters to a soldier far away
  has to choose between two friends | meets an old flame at a funeral | answers a letter meant for a neighbour
romance thrill: the love story [melted my heart/left me cold] | the first kiss is {quality}
  I [cried happy tears/rolled my eyes a lot] | I did not [want the lovers to part/believe in the lovers]
ghost story lead: village priest | new housekeeper | curious professor | night guard | young teacher
ghost story place: in an empty hotel | in a house on the moor | at a boarding school | in an old lighthouse
ghost story deed: hears a child singing behind the wall | finds a room that is missing from every map
  reads the diary of a drowned girl | has to leave before the first snow | sees {her} own face in a painting
ghost story thrill: the scares are {quality} | [I slept with the light on/the ghost is as scary as a pillow]
  the ghost [gave me chills/made me giggle] | the ghost is never [silly/frightening]
"""
WORDS = ("genre", "venue", "film", "it", "name", "surname", "director", "friend", "lead", "place", "deed")
FLIPPED = {"concession": "aspect", "fault": "tone"}  # what the other side would say
NEGATED_SHARE = 0.14  # of the opinions of which there is a negated form
SLOT = re.compile(r"\{([^}]*)\}")
CHOICE = re.compile(r"\[([^/\]]*)/([^\]]*)\]")
NEGATION = re.compile(r"\b(not|no|never|nobody|nothing|cannot)\b", re.IGNORECASE)


def parse_grammar(label: int) -> dict[str, tuple[list[str], list[str]]]:
    """Returns the templates of a reviewer of this label by rule: the plain and the negated ones."""
    rules: dict[str, tuple[list[str], list[str]]] = {}
    for line in filter(None, GRAMMAR.splitlines()):
        if not line.startswith(" "):
            rule, line = line.split(": ", 1)
        for template in CHOICE.sub(r"\1" if label else r"\2", line).strip().split(" | "):
            plain, negated = rules.setdefault(rule, ([], []))
            if NEGATION.search(template):
                negated.append(template)
            else:
                plain.append(template)
    return rules


RULES = (parse_grammar(0), parse_grammar(1))


class Review:
    """A review in the making: its label, the words of its film, and the templates used so far."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.label = rng.randrange(2)
        self.film = {}
        self.used = set()
        for word in WORDS:
            self.film[word] = self.choose(word, self.label)
        she, her = ("she", "her") if self.film["name"].endswith("a") else ("he", "his")
        self.film |= {"she": she, "her": her, "star": "{name} {surname}", "role": self.film["lead"]}

    def choose(self, name: str, label: int) -> str:
        """Picks a template of the rule, one that is new to this review if there is any."""
        rules = RULES[label]
        if name not in rules:
            genre_rule = f"{self.film['genre']} {name}"
            venue_rule = f"{self.film['venue']} {name}"
            name = genre_rule if genre_rule in rules else venue_rule
        templates, negated = rules[name]
        if negated and label == self.label and self.rng.random() < NEGATED_SHARE:
            templates = negated
        new = [template for template in templates if template not in self.used]
        template = self.rng.choice(new or templates)
        self.used.add(template)
        return template

    def write(self, name: str, label: int) -> str:
        """Returns a word of the film, or a template of the rule with all its slots filled."""
        if name in FLIPPED:
            name = FLIPPED[name]
            label = 1 - label
        template = self.film.get(name) or self.choose(name, label)
        text = SLOT.sub(lambda slot: self.write(slot[1], label), template)
        if SLOT.fullmatch(template):  # a rule that only names others stands for a whole clause
            self.introduce(text)
        return text

    def introduce(self, text: str) -> None:
        """Gives whatever the text has named the shorter name that it goes by from then on."""
        film = self.film
        is_named = re.search(rf"\b(it|{film['film']}|{film['genre']})\b", text)
        film["it"] = "it" if is_named else "the {film}"
        if film["surname"] in text:
            film["star"] = film["surname"]
        if film["lead"] in text:
            film["role"] = film["lead"].split()[-1]

    def sentence(self, rule: str) -> str:
        """Writes the sentence of one rule of the plan, with its capital and its full stop."""
        text = self.write(rule, self.label)
        self.introduce(text)
        stop = "" if text.endswith("?") else "."
        return text[0].upper() + text[1:] + stop


def movie_reviews(n: int, seed: int, kind: str | None = None) -> list[dict]:
    """Returns n reviews {"text": str, "label": int}, label 1 positive and 0 negative.

    A seed and kind always give the same list, and a longer list starts with the shorter one. Kind
    "mixed" keeps only the reviews that first grant the other side a point, "negated" only those with a
    negated opinion ("it is not bad at all"). Raises ValueError for any other kind.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"kind must be None or one of {KINDS}, not {kind!r}")
    rng = random.Random(seed)
    reviews = []
    while len(reviews) < n:
        review = Review(rng)
        plan = review.write("plan", review.label).split()
        text = " ".join(review.sentence(rule) for rule in plan)
        text = re.sub(r"\b([Aa])(?= [aeiou])", r"\1n", text)
        if kind == "mixed" and "contrast" not in plan:
            continue
        if kind == "negated" and not NEGATION.search(text):
            continue
        reviews.append({"text": text, "label": review.label})
    return reviews
