"""Lists the wordings of the training streams. `_synthetic_words_test` has none of them."""

# One entry a line would make these tables hard to survey.
# fmt: off
from __future__ import annotations

from ._synthetic_wording import Frames, Wording

WORDINGS = {
    "city": Wording(
        state=(
            "{S} [live|lives] in {v}", "{Ss} home is in {v}", "{S} [have|has] a small flat in {v}",
            "{S} [am|is] based in {v}", "{v} is where {S} [live|lives]", "{S} [rent|rents] a room in {v}",
            "{Ss} address is in {v}",
        ),
        change=(
            "{S} moved to {v} {when}", "{S} [have|has] left {old} and now [live|lives] in {v}",
            "{S} moved from {old} to {v} {when}", "{Ss} new home is in {v}, not in {old} any more",
            "{S} gave up the flat in {old} and moved to {v}",
        ),
        ask=("Where does {S} live?", "In which city does {S} live?", "Which city is {Ss} home in?"),
        still=("Does {S} still live in {v}?",),
        first=("Where did {S} live first, in {a} or in {b}?",),
        times=("How many times did {S} move to a new city?",),
        many=("How many people live in {v}?",),
        who=("the person who lives in {v}",),
    ),
    "job": Wording(
        state=(
            "{S} [work|works] as a {v}", "{S} [am|is] a {v}", "{Ss} job is {v}", "{S} [have|has] a job as a {v}",
            "{S} [earn|earns] {my} money as a {v}", "{S} [am|is] a {v} by trade",
            "{S} [have|has] worked as a {v} for years",
        ),
        change=(
            "{S} [have|has] a new job as a {v}", "{S} stopped working as a {old} and [am|is] now a {v}",
            "{S} became a {v} {when}", "{S} started a new job as a {v} {when}",
            "{S} [am|is] not a {old} any more; {my} new job is {v}",
        ),
        ask=("What is the job of {S}?", "What does {S} do for a living?", "What is {Ss} job?"),
        still=("Does {S} still work as a {v}?",),
        first=("Which job did {S} have first, {a} or {b}?",),
        times=("How many times did {S} change jobs?",),
        who=("the person who works as a {v}",),
    ),
    "employer": Wording(
        state=(
            "{S} [work|works] for {v}", "{Ss} company is {v}", "{S} [am|is] employed at {v}",
            "{Ss} employer is {v}", "{S} [have|has] a desk at {v}", "{v} is the company {S} [work|works] for",
        ),
        change=(
            "{S} left {old} and now [work|works] for {v}", "{S} joined {v} {when}", "{Ss} new employer is {v}",
            "{S} went from {old} to {v} {when}",
        ),
        ask=("Which company does {S} work for?", "Who is the employer of {S}?", "Who is {Ss} employer?"),
        still=("Does {S} still work for {v}?",),
        first=("Which company did {S} work for first, {a} or {b}?",),
        times=("How many times did {S} change companies?",),
        who=("the person who works for {v}",),
    ),
    "pet": Wording(
        state=(
            "{Ss} {species} is called {v}", "{S} [have|has] a {species} named {v}",
            "the name of {Ss} {species} is {v}", "{S} [own|owns] a {species}, and its name is {v}",
            "{S} [take|takes] care of a {species} called {v}", "{v} is {Ss} {species}",
            "{S} named {my} {species} {v}",
        ),
        ask=(
            "What is the {species} of {S} called?", "What is the name of {Ss} {species}?",
            "What is {Ss} {species} called?",
        ),
        who=("the owner of {v}", "the person whose pet is called {v}"),
    ),
    "food": Wording(
        state=(
            "{Ss} favourite food is {v}", "{S} [like|likes] {v} more than any other food",
            "{S} [love|loves] {v} most of all", "the food {S} [like|likes] best is {v}",
            "{v} is {Ss} favourite food", "{S} would eat {v} every day if {he} could",
            "for dinner {S} always [choose|chooses] {v}",
        ),
        change=(
            "{Ss} favourite food is now {v}", "{S} [am|is] tired of {old} and now [like|likes] {v} best",
            "{S} used to love {old}, but {my} new favourite food is {v}",
            "{v} has replaced {old} as {Ss} favourite food",
        ),
        ask=("What is the favourite food of {S}?", "Which food does {S} like best?", "What is {Ss} favourite food?"),
        first=("Which food did {S} like best first, {a} or {b}?",),
        times=("How many times did {S} change the favourite food?",),
        many=("How many people like {v} best of all food?",),
        who=("the person who likes {v} best",),
    ),
    "drink": Wording(
        state=(
            "{Ss} favourite drink is {v}", "{S} always [order|orders] {v} to drink",
            "{S} [drink|drinks] {v} every morning", "when {S} [am|is] thirsty, {he} [want|wants] {v}",
            "the drink {S} [like|likes] best is {v}", "{S} never [go|goes] a day without {v}",
        ),
        change=(
            "{S} [drink|drinks] {v} now instead of {old}", "{S} switched from {old} to {v} {when}",
            "{Ss} favourite drink is {v} now", "{S} [have|has] had enough of {old} and [order|orders] {v} now",
        ),
        ask=("What is the favourite drink of {S}?", "What does {S} like to drink?", "What is {Ss} favourite drink?"),
        first=("Which drink did {S} prefer first, {a} or {b}?",),
        times=("How many times did {S} change the favourite drink?",),
        many=("How many people like to drink {v}?",),
        who=("the person who drinks {v}",),
    ),
    "instrument": Wording(
        state=(
            "{S} [play|plays] the {v}", "{S} [am|is] learning the {v}", "{Ss} instrument is the {v}",
            "{S} [take|takes] lessons on the {v}", "{S} [practise|practises] the {v} every evening",
            "{S} [have|has] a {v} lesson every week", "{S} [play|plays] the {v} in a small band",
        ),
        change=(
            "{S} switched from the {old} to the {v} {when}", "{S} [play|plays] the {v} now, not the {old}",
            "{S} sold the {old} and now [play|plays] the {v}", "{Ss} new instrument is the {v}",
        ),
        drop=(
            "{S} gave up the {v} {when}", "{S} [do|does] not play the {v} any more",
            "{S} stopped playing the {v} {when}", "{S} sold the {v} and [play|plays] no instrument now",
        ),
        ask=("Which instrument does {S} play?", "What instrument does {S} play?", "What is {Ss} instrument?"),
        dropped=("Which instrument did {S} give up?", "Which instrument does {S} not play any more?"),
        still=("Does {S} still play the {v}?",),
        first=("Which instrument did {S} play first, the {a} or the {b}?",),
        times=("How many times did {S} change to a new instrument?",),
        many=("How many people play the {v}?",),
        who=("the person who plays the {v}",),
    ),
    "phone": Wording(
        state=(
            "{Ss} phone is a {v}", "{S} [use|uses] a {v} as {my} phone", "{S} [have|has] a {v} phone",
            "{S} [carry|carries] a {v} phone", "the phone {S} [use|uses] is a {v}",
            "{S} [make|makes] all calls on a {v}",
        ),
        change=(
            "{S} bought a new phone {when}, a {v}", "{Ss} new phone is a {v}",
            "{S} replaced the {old} with a {v} {when}", "{Ss} {old} broke, so {he} now [use|uses] a {v}",
        ),
        ask=("Which phone does {S} have?", "What phone does {S} use?", "What model is {Ss} phone?"),
        still=("Does {S} still use the {v}?",),
        first=("Which phone did {S} have first, the {a} or the {b}?",),
        times=("How many times did {S} get a new phone?",),
        who=("the person who uses a {v} phone",),
    ),
    "sport": Wording(
        state=(
            "{Ss} sport is {v}", "{S} [spend|spends] every Sunday on {v}", "{S} [do|does] {v} twice a week",
            "{S} [am|is] in a {v} club", "{S} [have|has] {v} practice after work", "the sport {S} [do|does] is {v}",
            "{S} [keep|keeps] fit with {v}",
        ),
        change=(
            "{S} left the {old} club and joined a {v} club", "{S} switched from {old} to {v} {when}",
            "{Ss} new sport is {v}", "{S} [do|does] {v} now instead of {old}",
        ),
        drop=(
            "{S} gave up {v} {when}", "{S} [do|does] no {v} any more",
            "{S} left the {v} club and [do|does] no sport now", "{S} quit {v} because of a bad knee",
        ),
        ask=("Which sport does {S} do?", "What sport does {S} do?", "What is {Ss} sport?"),
        dropped=("Which sport did {S} give up?", "Which sport does {S} not do any more?"),
        still=("Does {S} still do {v}?",),
        first=("Which sport did {S} do first, {a} or {b}?",),
        times=("How many times did {S} change to a new sport?",),
        many=("How many people do {v}?",),
        who=("the person who does {v}",),
    ),
    "language": Wording(
        state=(
            "{S} [am|is] learning {v}", "{S} [take|takes] a {v} course", "{S} [study|studies] {v} in the evening",
            "{S} [have|has] {v} lessons on the phone", "the language {S} [am|is] learning is {v}",
            "{S} [practise|practises] {v} with a tutor",
        ),
        change=(
            "{S} [am|is] learning {v} now instead of {old}", "{S} switched from {old} to {v} lessons {when}",
            "{S} finished the {old} course and started to learn {v}", "{Ss} new language is {v}",
        ),
        drop=(
            "{S} stopped learning {v} {when}", "{S} gave up {v} lessons {when}",
            "{S} [am|is] not learning {v} any more", "{S} dropped the {v} course",
        ),
        ask=(
            "Which language is {S} learning?", "What language does {S} study?",
            "What is the language that {S} is learning?",
        ),
        dropped=("Which language did {S} stop learning?", "Which language did {S} give up?"),
        still=("Is {S} still learning {v}?",),
        first=("Which language did {S} learn first, {a} or {b}?",),
        times=("How many times did {S} switch to a new language?",),
        many=("How many people are learning {v}?",),
        who=("the person who is learning {v}",),
    ),
    "trip": Wording(
        state=(
            "{S} [am|is] going to {v} on holiday", "{S} [have|has] booked a trip to {v}",
            "{Ss} next holiday is in {v}", "{S} [plan|plans] a trip to {v}", "{S} will travel to {v} next month",
            "{S} bought tickets to {v}", "{S} [am|is] packing for a trip to {v}",
        ),
        change=(
            "{S} will travel to {v} instead of {old}", "{S} cancelled {old} and booked a trip to {v}",
            "{Ss} holiday is now in {v}, not in {old}", "{S} changed {my} tickets from {old} to {v} {when}",
        ),
        drop=(
            "{Ss} trip to {v} is cancelled", "{S} cancelled the trip to {v} {when}",
            "{S} [am|is] not going to {v} after all", "forget what was said about {v}; {S} will stay at home",
        ),
        ask=("Where will {S} go on holiday?", "Which country will {S} travel to?", "Where is {Ss} next holiday?"),
        dropped=("Which trip did {S} cancel?", "Where does {S} not want to go any more?"),
        still=("Is {S} still going to {v}?",),
        first=("Which trip did {S} plan first, {a} or {b}?",),
        times=("How many times did {S} change the travel plan?",),
        who=("the person who will travel to {v}",),
    ),
    "color": Wording(
        state=(
            "{Ss} bicycle is {v}", "{S} [ride|rides] a bicycle that is {v}", "{S} [have|has] a {v} bicycle",
            "the bicycle {S} [ride|rides] is {v}", "{S} painted {my} bicycle {v}",
            "{v} is the colour of {Ss} bicycle",
        ),
        ask=("What colour is the bicycle of {S}?", "Which colour is {Ss} bicycle?", "What colour is {Ss} bicycle?"),
        who=("the person with the {v} bicycle",),
    ),
    "deadline": Wording(
        state=(
            "the deadline of {S} is {v}", "{S} must be ready by {v}", "{S} is due on {v}",
            "{S} has to be finished on {v}", "the last day for {S} is {v}", "{v} is the deadline of {S}",
        ),
        change=(
            "the deadline of {S} moved from {old} to {v}", "{S} is now due on {v}",
            "the new deadline of {S} is {v}", "{S} has more time: it is due on {v}, not on {old}",
        ),
        ask=("When is the deadline of {S}?", "When is {S} due?", "By which date must {S} be ready?"),
        first=("Which deadline did {S} have first, {a} or {b}?",),
        times=("How many times did the deadline of {S} change?",),
    ),
    "lead": Wording(
        state=(
            "{v} leads {S}", "the leader of {S} is {v}", "{S} is led by {v}", "{v} is in charge of {S}",
            "{v} is responsible for {S}", "the person in charge of {S} is {v}",
        ),
        change=(
            "{v} took over {S} from {old} {when}", "{v} now leads {S} instead of {old}",
            "the new leader of {S} is {v}", "{old} handed {S} over to {v} {when}",
        ),
        ask=("Who leads {S}?", "Who is in charge of {S}?", "Who is the leader of {S}?"),
        first=("Who led {S} first, {a} or {b}?",),
        times=("How many times did {S} get a new leader?",),
        who=("the leader of {S}",),
    ),
    "room": Wording(
        state=(
            "the {S} team meets in the {v}", "the meetings of {S} are in the {v}",
            "{S} has its meetings in the {v}", "the {v} is where the {S} team meets",
            "the meeting place of {S} is the {v}", "the {S} team uses the {v}",
        ),
        change=(
            "the {S} team now meets in the {v}, not in the {old}", "the meetings of {S} moved to the {v} {when}",
            "the {S} team left the {old} and meets in the {v} now", "the new meeting place of {S} is the {v}",
        ),
        ask=(
            "Where does the {S} team meet?", "What is the meeting place of {S}?",
            "In which room does the {S} team meet?",
        ),
        first=("Where did the {S} team meet first, in the {a} or in the {b}?",),
        times=("How many times did the {S} team change rooms?",),
    ),
    "meeting": Wording(
        state=(
            "the {S} team meets on {v}", "the weekly meeting of {S} is on {v}", "{S} has its weekly meeting on {v}",
            "the {S} meeting starts on {v}", "every week the {S} team meets on {v}",
            "the usual meeting of {S} is on {v}",
        ),
        change=(
            "the {S} team now meets on {v}", "the {S} meeting moved from {old} to {v}",
            "the new time of the {S} meeting is {v}", "the {S} meeting is on {v} now, not on {old}",
        ),
        drop=(
            "the {S} meeting on {v} is cancelled for good", "there is no {S} meeting on {v} any more",
            "the {S} team dropped its meeting on {v}", "forget the {S} meeting on {v}; it is off",
        ),
        ask=("When does the {S} team meet?", "When is the weekly meeting of {S}?", "At what time is the {S} meeting?"),
        dropped=("Which meeting time of {S} was cancelled?", "When was the cancelled {S} meeting?"),
        still=("Does the {S} team still meet on {v}?",),
        first=("When did the {S} team meet first, on {a} or on {b}?",),
        times=("How many times did the {S} meeting get a new time?",),
    ),
    "client": Wording(
        state=(
            "{S} is for {v}", "the client of {S} is {v}", "{v} ordered {S}", "the team does {S} for {v}",
            "{v} pays for {S}", "the customer behind {S} is {v}",
        ),
        change=(
            "the new client of {S} is {v}", "{S} is now for {v}, not for {old}",
            "{v} took the place of {old} as client of {S}", "{old} left {S}, and {v} is the client now",
        ),
        ask=("Who is the client of {S}?", "Which company ordered {S}?", "For which company is {S}?"),
        first=("Which client did {S} have first, {a} or {b}?",),
        times=("How many times did {S} get a new client?",),
    ),
    "tour": Wording(
        state=(
            "{S} visited the {v} today", "today {S} came to the {v} on {my} tour", "{S} spent the day at the {v}",
            "the stop of {Ss} tour today was the {v}", "{S} saw the {v} on {my} tour",
            "{S} walked around the {v} this afternoon", "today {S} took photos of the {v}",
        ),
        ask=("What did {S} visit on Day {d}?", "Where did the tour of {S} stop on Day {d}?"),
        summary=("Summarise the tour of {S}: which places did {S} visit?", "List all the stops of {Ss} tour."),
        first=("Which did {S} visit first, the {a} or the {b}?",),
        length=("How many places did {S} visit on the tour?",),
    ),
    "course": Wording(
        state=(
            "{S} learned to make {v} today", "in the cooking course {S} made {v}", "today {S} cooked {v} in class",
            "the lesson of {Ss} cooking course was {v}", "{S} practised {v} at the cooking school",
            "{Ss} dish in class today was {v}",
        ),
        ask=("What did {S} make in the cooking course on Day {d}?", "Which dish did {S} learn on Day {d}?"),
        summary=(
            "Summarise the cooking course of {S}: which dishes did {S} make?",
            "List all dishes of {Ss} cooking course.",
        ),
        first=("Which dish did {S} make first, {a} or {b}?",),
        length=("How many dishes did {S} make in the cooking course?",),
    ),
    "log": Wording(
        state=(
            "the {S} team finished the {v} today", "the {v} of {S} is done", "today the {S} team completed the {v}",
            "work on the {v} of {S} ended today", "{S} made progress: the {v} is ready",
            "the {v} of {S} was signed off today",
        ),
        ask=("What did the {S} team finish on Day {d}?", "Which part of {S} was done on Day {d}?"),
        summary=("Summarise the progress of {S}: which parts are done?", "List all finished parts of {S}."),
        first=("Which part of {S} was done first, the {a} or the {b}?",),
        length=("How many parts of {S} are done?",),
    ),
}

FRAMES = Frames(
    when=(
        "yesterday", "last week", "on the weekend", "two days ago", "this week", "last night", "last Friday",
        "a week ago",
    ),
    openers=(
        "by the way,", "for the record,", "one more thing:", "a quick note:", "as you know,", "please remember:",
        "so,", "here is a fact:", "just to be clear,", "to keep you informed,", "small detail:", "before I forget,",
    ),
    change_openers=(
        "news:", "big news:", "a change:", "an update:", "please note the change:", "things are different now:",
        "something has changed:", "plans have changed:", "listen to this:",
    ),
    hearsay=(
        "I heard that", "someone told me that", "I know that", "it seems that", "people say that", "I am sure that",
    ),
    endings=(
        ", in case you ask", ", just so you know", ", if anyone asks", ", as I said", ", which is good to know",
        ", so please write it down", ", believe it or not",
    ),
    greetings=("Hi {to},", "Hello {to},", "Dear {to},", "Good morning {to},"),
    closings=("Best, {S}", "See you, {S}", "Thanks, {S}", "Cheers, {S}"),
    subjects=("news", "this and that", "a few things", "short update", "hello", "notes"),
    diary=("{S}'s diary:", "Dear diary, this is {S}.", "Diary of {S}:"),
    report=("Notes of the day:", "Daily report:", "Report:", "Town bulletin:", "Summary by the office:"),
    channel=("#general", "#team", "#kitchen", "#friends"),
    label_state=(
        'message: "{m}" -> label: {v}', 'the message "{m}" got label {v}', 'label {v} was given to "{m}"',
        'for "{m}" the right label is {v}', '"{m}" belongs under label {v}',
        'the helpdesk put "{m}" under label {v}', 'we marked "{m}" with label {v}',
    ),
    label_ask=(
        'Which label did the message "{m}" get?', 'What is the label of the message "{m}"?',
        'Under which label is the message "{m}"?',
    ),
    label_ask_new=(
        'A new message says: "{m}". Which label does it get?', 'Which label should the new message "{m}" get?',
        'What is the right label for the new message "{m}"?',
    ),
)
