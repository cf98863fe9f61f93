"""Lists the wordings of the test streams. `_synthetic_words_train` has none of them."""

# One entry a line would make these tables hard to survey.
# fmt: off
from __future__ import annotations

from ._synthetic_wording import Frames, Wording

WORDINGS = {
    "city": Wording(
        state=(
            "{S} [have|has] {my} home in {v}", "the city {S} [call|calls] home is {v}",
            "{S} [share|shares] a house in {v}", "{S} [am|is] living in {v}",
        ),
        change=(
            "{S} [have|has] moved away from {old} and [am|is] now living in {v}",
            "{S} found a new home in {v} {when}", "{S} said goodbye to {old} and settled in {v}",
        ),
        ask=("What city does {S} live in?", "Which city is home for {S}?"),
        still=("Is {v} still the home of {S}?",),
        first=("Which city was home for {S} first, {a} or {b}?",),
        times=("How often has {S} moved to another city?",),
        many=("How many people have their home in {v}?",),
        who=("the person whose home is in {v}",),
    ),
    "job": Wording(
        state=(
            "{S} [make|makes] a living as a {v}", "{S} [am|is] working as a {v}", "by profession {S} [am|is] a {v}",
            "{Ss} profession is {v}",
        ),
        change=(
            "{S} [have|has] changed jobs and [am|is] a {v} now",
            "{S} used to be a {old}, but now {he} [work|works] as a {v}", "{S} found work as a {v} {when}",
        ),
        ask=("What is the profession of {S}?", "As what does {S} work?"),
        still=("Is {S} still a {v}?",),
        first=("What did {S} work as first, {a} or {b}?",),
        times=("How often has {S} changed jobs?",),
        who=("the person whose profession is {v}",),
    ),
    "employer": Wording(
        state=(
            "{S} [work|works] at {v}", "the company that pays {Ss} salary is {v}",
            "{S} [am|is] on the staff of {v}", "{Ss} workplace is {v}",
        ),
        change=(
            "{S} quit {old} and [am|is] now at {v}", "{S} moved from the company {old} to {v}",
            "{S} signed a contract with {v} {when}",
        ),
        ask=("At which company does {S} work?", "What company employs {S}?"),
        still=("Is {S} still working at {v}?",),
        first=("At which company was {S} first, {a} or {b}?",),
        times=("How often has {S} gone to another company?",),
        who=("the person who is employed by {v}",),
    ),
    "pet": Wording(
        state=(
            "{Ss} {species} answers to the name {v}", "{S} [live|lives] with a {species} called {v}",
            "{S} [call|calls] {my} {species} {v}", "{Ss} {species} has the name {v}",
        ),
        ask=("What name does the {species} of {S} have?", "What does {S} call the {species}?"),
        who=("the person with the pet {v}",),
    ),
    "food": Wording(
        state=(
            "no dish can beat {v} in {Ss} opinion", "{S} [enjoy|enjoys] {v} more than any other dish",
            "{Ss} best-loved dish is {v}", "the dish {S} [love|loves] most is {v}",
        ),
        change=(
            "{S} no longer [love|loves] {old} most; now it is {v}",
            "these days the dish {S} [love|loves] most is {v}, not {old}",
            "{S} tried {v} {when}, and now it is {my} best-loved dish",
        ),
        ask=("Which dish does {S} love most?", "What food does {S} enjoy most?"),
        first=("Which dish did {S} love first, {a} or {b}?",),
        times=("How often has {S} found a new best-loved dish?",),
        many=("How many people love {v} most of all dishes?",),
        who=("the person who loves {v} most",),
    ),
    "drink": Wording(
        state=(
            "{S} [prefer|prefers] {v} to all other drinks", "{Ss} usual drink is {v}",
            "in a café {S} [ask|asks] for {v}", "{S} [have|has] {v} with every meal",
        ),
        change=(
            "{S} [prefer|prefers] {v} to {old} now", "{Ss} usual drink is no longer {old} but {v}",
            "{S} gave up {old} {when} and [have|has] {v} with meals",
        ),
        ask=("What is the usual drink of {S}?", "Which drink does {S} prefer?"),
        first=("What was the usual drink of {S} first, {a} or {b}?",),
        times=("How often has {S} changed to another usual drink?",),
        many=("How many people prefer {v} as a drink?",),
        who=("the person who prefers to drink {v}",),
    ),
    "instrument": Wording(
        state=(
            "{S} [have|has] taken up the {v}", "the {v} is the instrument {S} [practise|practises]",
            "{S} [make|makes] music on the {v}", "{S} [own|owns] a {v} and [play|plays] it often",
        ),
        change=(
            "{S} swapped the {old} for the {v}", "{S} put the {old} away and took up the {v} {when}",
            "instead of the {old} {S} now [make|makes] music on the {v}",
        ),
        drop=(
            "{S} no longer [play|plays] the {v}", "{S} put the {v} away for ever",
            "{S} ended {my} {v} lessons {when}",
        ),
        ask=("On which instrument does {S} make music?", "What musical instrument does {S} have?"),
        dropped=("Which instrument does {S} no longer play?",),
        still=("Is {S} still a player of the {v}?",),
        first=("Which instrument did {S} take up first, the {a} or the {b}?",),
        times=("How often has {S} taken up another instrument?",),
        many=("How many people make music on the {v}?",),
        who=("the person who makes music on the {v}",),
    ),
    "phone": Wording(
        state=(
            "{S} [own|owns] a {v} phone", "the model of {Ss} phone is {v}", "{S} [call|calls] everybody from a {v}",
            "{Ss} mobile is a {v}",
        ),
        change=(
            "{S} traded the {old} for a {v}", "{S} now [own|owns] a {v} phone instead of the {old}",
            "{S} got a {v} as {my} new phone {when}",
        ),
        ask=("Which phone model does {S} own?", "What mobile does {S} have?"),
        still=("Does {S} still own the {v} phone?",),
        first=("Which mobile did {S} own first, the {a} or the {b}?",),
        times=("How often has {S} bought another phone?",),
        who=("the person with a {v} phone",),
    ),
    "sport": Wording(
        state=(
            "{S} [train|trains] hard in {v}", "{S} [am|is] a big fan of {v} and [do|does] it weekly",
            "{S} [stay|stays] healthy with {v}", "{S} [go|goes] to {v} training",
        ),
        change=(
            "{S} swapped {old} training for {v} training", "{S} [train|trains] in {v} now and no longer in {old}",
            "{S} took up {v} {when} in place of {old}",
        ),
        drop=(
            "{S} no longer [train|trains] in {v}", "{S} had to stop {v} {when}",
            "{S} [have|has] ended {my} {v} training",
        ),
        ask=("In which sport does {S} train?", "What sport does {S} practise?"),
        dropped=("In which sport does {S} no longer train?",),
        still=("Is {S} still training in {v}?",),
        first=("Which sport did {S} train in first, {a} or {b}?",),
        times=("How often has {S} taken up another sport?",),
        many=("How many people train in {v}?",),
        who=("the person who trains in {v}",),
    ),
    "language": Wording(
        state=(
            "{S} [attend|attends] {v} classes", "{S} [want|wants] to speak {v} and [work|works] on it daily",
            "{Ss} evening class is {v}", "{S} [read|reads] easy books to learn {v}",
        ),
        change=(
            "{S} swapped {my} {old} classes for {v} classes",
            "{S} no longer [attend|attends] {old} classes but {v} classes",
            "{S} began with {v} {when} and left {old} behind",
        ),
        drop=(
            "{S} no longer [attend|attends] {v} classes", "{S} ended {my} {v} classes {when}",
            "{S} [have|has] lost interest in {v} and stopped",
        ),
        ask=("Which language classes does {S} attend?", "What language does {S} want to speak?"),
        dropped=("Which language classes did {S} end?",),
        still=("Does {S} still attend {v} classes?",),
        first=("Which language classes did {S} attend first, {a} or {b}?",),
        times=("How often has {S} begun another language?",),
        many=("How many people attend {v} classes?",),
        who=("the person who attends {v} classes",),
    ),
    "trip": Wording(
        state=(
            "{S} will spend the holidays in {v}", "{S} [have|has] a flight to {v} soon", "{Ss} travel plan is {v}",
            "{S} will fly to {v} in summer",
        ),
        change=(
            "{Ss} travel plan is no longer {old} but {v}", "{S} will fly to {v} and not to {old}",
            "{S} rebooked {my} flight from {old} to {v} {when}",
        ),
        drop=(
            "{S} called off the journey to {v}", "{S} will not fly to {v} any more",
            "{Ss} flight to {v} was given back {when}",
        ),
        ask=("Where will {S} spend the holidays?", "To which country will {S} fly?"),
        dropped=("To which country will {S} not fly any more?",),
        still=("Will {S} still fly to {v}?",),
        first=("Which travel plan did {S} have first, {a} or {b}?",),
        times=("How often has {S} made another travel plan?",),
        who=("the person who will fly to {v}",),
    ),
    "color": Wording(
        state=(
            "{Ss} raincoat is {v}", "{S} [wear|wears] a {v} raincoat", "the raincoat {S} [own|owns] is {v}",
            "{S} [have|has] a raincoat in {v}",
        ),
        ask=("What colour is the raincoat of {S}?", "Which colour does the raincoat of {S} have?"),
        who=("the person in the {v} raincoat",),
    ),
    "deadline": Wording(
        state=(
            "{S} ends on {v}", "we have to deliver {S} on {v}", "the due date of {S} is {v}",
            "{S} must be delivered by {v}",
        ),
        change=(
            "the due date of {S} is now {v} instead of {old}", "{S} was postponed and ends on {v}",
            "we now have to deliver {S} on {v}, no longer on {old}",
        ),
        ask=("What is the due date of {S}?", "On which date must {S} be delivered?"),
        first=("Which due date did {S} have first, {a} or {b}?",),
        times=("How often has the due date of {S} changed?",),
    ),
    "lead": Wording(
        state=("{v} manages {S}", "the manager of {S} is {v}", "{S} is in the hands of {v}", "{v} heads {S}"),
        change=(
            "{v} replaced {old} as the manager of {S}", "{S} passed from {old} to {v} {when}",
            "{v} is the new manager of {S}",
        ),
        ask=("Who manages {S}?", "Who is the manager of {S}?"),
        first=("Who managed {S} first, {a} or {b}?",),
        times=("How often has {S} passed to another manager?",),
        who=("the manager of {S}",),
    ),
    "room": Wording(
        state=(
            "the {S} group gathers in the {v}", "you find the {S} group in the {v}", "the {v} is reserved for {S}",
            "{S} is discussed in the {v}",
        ),
        change=(
            "the {S} group no longer gathers in the {old} but in the {v}",
            "the {v} was reserved for {S} {when} instead of the {old}",
            "{S} is discussed in the {v} now instead of the {old}",
        ),
        ask=("Where does the {S} group gather?", "Which room is reserved for {S}?"),
        first=("Where did the {S} group gather first, in the {a} or in the {b}?",),
        times=("How often has the {S} group changed its room?",),
    ),
    "meeting": Wording(
        state=(
            "the {S} call takes place on {v}", "the {S} group talks every {v}", "the regular {S} call is on {v}",
            "on {v} there is always a {S} call",
        ),
        change=(
            "the {S} call was shifted from {old} to {v}", "the {S} group now talks every {v}",
            "the {S} call takes place on {v} instead of {old}",
        ),
        drop=(
            "the {S} call on {v} no longer takes place", "the {S} group gave up its call on {v}",
            "nobody needs the {S} call on {v}, so it was removed",
        ),
        ask=("When does the {S} call take place?", "When does the {S} group talk?"),
        dropped=("When was the {S} call that was removed?",),
        still=("Does the {S} call on {v} still take place?",),
        first=("When was the {S} call first, on {a} or on {b}?",),
        times=("How often was the {S} call shifted?",),
    ),
    "client": Wording(
        state=(
            "{v} is the buyer of {S}", "{S} was ordered by {v}", "{S} is made for {v}", "the buyer of {S} is {v}",
        ),
        change=(
            "{S} has a new buyer: {v}", "the buyer of {S} is no longer {old} but {v}",
            "{v} bought {S} after {old} pulled out",
        ),
        ask=("Who is the buyer of {S}?", "By which company is {S} paid?"),
        first=("Which buyer did {S} have first, {a} or {b}?",),
        times=("How often has {S} found another buyer?",),
    ),
    "tour": Wording(
        state=(
            "{Ss} sight of the day was the {v}", "{S} went to see the {v} today",
            "{S} took a long look at the {v} today", "{Ss} tour reached the {v} today",
        ),
        ask=("Which sight did {S} see on Day {d}?", "What did the tour of {S} reach on Day {d}?"),
        summary=("Give a summary of the tour of {S}: which sights did {S} see?", "Name all sights of {Ss} tour."),
        first=("Which sight did {S} see first, the {a} or the {b}?",),
        length=("How many sights did {S} see on the tour?",),
    ),
    "course": Wording(
        state=(
            "{S} made {v} in the kitchen class today", "the recipe {S} tried today was {v}",
            "{Ss} kitchen class was about {v} today", "{S} brought {v} home from the kitchen class",
        ),
        ask=("What was the kitchen class of {S} about on Day {d}?", "Which recipe did {S} try on Day {d}?"),
        summary=(
            "Give a summary of the kitchen class of {S}: which recipes did {S} try?",
            "Name all recipes of {Ss} kitchen class.",
        ),
        first=("Which recipe did {S} try first, {a} or {b}?",),
        length=("How many recipes did {S} try in the kitchen class?",),
    ),
    "log": Wording(
        state=(
            "the {S} group delivered the {v} today", "{S} can tick off the {v} today",
            "the {v} for {S} was delivered today", "good progress on {S}: today the {v} was delivered",
        ),
        ask=("What did the {S} group deliver on Day {d}?", "What was delivered for {S} on Day {d}?"),
        summary=("Give a summary of {S}: what was delivered?", "Name everything that was delivered for {S}."),
        first=("What was delivered first for {S}, the {a} or the {b}?",),
        length=("How many things were delivered for {S}?",),
    ),
}

FRAMES = Frames(
    when=("three days ago", "this morning", "last month", "on Thursday evening", "the other day"),
    openers=(
        "incidentally,", "worth knowing:", "as a reminder,", "to mention it once,", "in other matters,",
        "let me add:", "also,",
    ),
    change_openers=("attention:", "a correction:", "not as before:", "a surprise:", "new situation:"),
    hearsay=("I was told that", "rumour has it that", "my neighbour says that", "I found out that"),
    endings=(", if you want to know", ", so keep it in mind", ", to be exact", ", as you may guess"),
    greetings=("Good evening {to},", "Hey {to},", "My dear {to},"),
    closings=("Yours, {S}", "Take care, {S}", "Bye for now, {S}"),
    subjects=("greetings", "what is going on", "my day", "a few lines"),
    diary=("Journal of {S}:", "{S}'s private journal:"),
    report=("Log of the office:", "What happened:", "Minutes:"),
    channel=("#lounge", "#random", "#lunch"),
    label_state=(
        '"{m}" = code {v}', 'the ticket "{m}" was filed with code {v}',
        'someone wrote "{m}", and it became code {v}', 'code {v} is correct for "{m}"',
    ),
    label_ask=('With which code was "{m}" filed?', 'What code does the ticket "{m}" have?'),
    label_ask_new=('A new ticket says: "{m}". What is its code?', 'With which code should "{m}" be filed?'),
)
