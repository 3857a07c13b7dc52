"""The English that MemReader knows: patterns of commands, corrections, questions and statements.

All match the beginning of what they are given, in any case. Apostrophes are straight when they come here.
"""

from __future__ import annotations

import re


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_GAP = r"[\s,:;.!–—-]*"
_NOT = r"(?:do\s+not|don't|dont|never|not)"
_STORE = (
    r"(?:remember|memori[sz]e|store|save|record|keep|note(?:\s+down)?|write\s+down|jot\s+down"
    r"|put\s+down|log)"
)
_NOTES = r"(?:notes?|memor(?:y|ies)|entr(?:y|ies)|facts?|records?|things?)"
_KNOW = (
    r"(?:you|i)(?:'ve|\s+have)?\s+(?:just\s+)?(?:know|remember|recall|saved?|stored?|noted?|have|got"
    r"|told\s+you|tell\s+you"
    r"|said|say|mentioned|mention|wrote)"
)
_WH = r"(?:what|who|whom|whose|where|when|why|how|which)"
_SUBJECT = (
    r"(?:i|you|he|she|it|we|they|there|this|that|these|those|the|a|an|my|your|his|her|its|our|their"
    r"|any\w*|some\w*"
    r"|all|one|people)"
)
_AUX = (
    r"(?:am|is|are|was|were|do|does|did|can|could|should|shall|would|will|may|might|must|have|has"
    r"|had|isn't|aren't"
    r"|wasn't|weren't|don't|doesn't|didn't|can't|couldn't|shouldn't|wouldn't|won't|haven't|hasn't)"
)

# -- what comes before the matter -----------------------------------------------------------------------

GREETING = _compiled(
    r"(?:hey|hi|hello|ok|okay|alright|well|so|and|oh|ah|um+|uh+|yes|yeah|btw|by\s+the\s+way|also"
    r"|great|cool|thanks"
    r"|thank\s+you)(?:\s+there)?(?=[\s,:;.!–—-])" + _GAP
)
PLEASE = _compiled(r"(?:please|pls|plz|kindly|just)\b" + _GAP)
ASKING = _compiled(
    r"(?:(?:can|could|would|will)\s+you(?:\s+(?:please|kindly|just|maybe|also))*\s+(?:mind\s+)?"
    r"|i(?:'d|\s+would)?\s+(?:want|need|like)\s+you\s+to\s+|i\s+would\s+like\s+you\s+to\s+"
    r"|(?:please\s+)?(?:make|be)\s+sure\s+(?:that\s+)?(?:you\s+|to\s+)|you\s+(?:can|may|should"
    r"|must)\s+|let's\s+)"
    r"(?:please\s+)?"
)
MIND_FORGET = _compiled(r"(?:forgetting|erasing|deleting|wiping|removing|discarding)\b(?:\s+about)?\s*")
CAN_YOU = _compiled(r"(?:can|could|would|will)\s+you\b")
ABANDON = _compiled(
    r"(?:(?:forget|scratch|scrap|drop)\s+(?:about\s+)?(?:it|that|this)|never\s*mind(?:\s+(?:that"
    r"|it))?)\s*[,;:.!–—-]+\s*(?=\S)"
)
TAKEN_BACK = _compiled(
    r"(?:forget|never\s*mind)\s+(?:about\s+)?what\s+i\s+(?:just\s+)?(?:said"
    r"|told\s+you)[^,;.?!]*[,;.]\s*(?=\S)"
)

# -- commands -------------------------------------------------------------------------------------------

NOT_FORGET = _compiled(
    rf"{_NOT}\s+(?:you\s+)?(?:ever\s+)?forget\b(?!\s+to\b)(?:\s+about)?{_GAP}(?:that\s+(?=\S))?"
)
NOT_FORGET_TO = _compiled(rf"{_NOT}\s+(?:you\s+)?(?:ever\s+)?forget\s+(?=to\b)")
NOT_STORE = _compiled(
    rf"(?:{_NOT}\s+{_STORE}|stop\s+(?:remembering|storing|saving|keeping|recording|noting))\b"
    rf"(?:\s+(?:track|a\s+(?:record|note))\s+of)?{_GAP}(?:(?:this|that|the\s+fact\s+that)\s*:?\s+(?=\S))?"
)
FORGET = _compiled(
    r"(?:forget|unremember|erase|delete|wipe|purge)\b(?!\s+(?:a|an|some|to)\b)(?:\s+about)?"
    rf"{_GAP}(?:(?:that|the\s+fact\s+that)\s+(?=\S))?"
)
FORGET_OWN = _compiled(
    r"(?:remove|drop|clear|discard|destroy|get\s+rid\s+of|throw\s+away|cancel)\b\s*"
    rf"(?=.{{0,120}}?(?:\b(?:{_NOTES}|profile)\b|\bmy\b|\b(?:you|i)\s+(?:know|said|told|have|remember)\b))"
)
REMIND_TO = _compiled(r"remind\s+me\s+(?=to\b)|remind\s+me\s+that\s+(?=\S)")
REMEMBER = _compiled(
    r"(?:(?:always\s+)?remember|memori[sz]e|(?:keep|bear)\s+(?:it\s+)?in\s+mind|(?:make|take"
    r"|keep)\s+(?:a\s+)?(?:mental\s+)?note"
    r"(?:\s+of)?|note\s+to\s+(?:my)?self|(?:please\s+)?note(?:\s+down)?(?=\s*:|\s+that\b|\s+down\b"
    r"|\s+(?:my|the|this|i)\b)"
    r"|fyi|for\s+(?:your|the|future)\s+(?:information|record|reference)|(?:write|jot|put)\s+down"
    r"|don't\s+lose"
    r"|(?:add|save|write)\s+(?:this\s+|it\s+)?(?:to|in)\s+(?:my|your)\s+(?:notes?|memory|memories)"
    r"|(?:store|save|record|log|keep)(?=\s+(?:this|that|the|my|our|a\s+note|it)\b|\s*:))(?![\w'])"
    rf"{_GAP}(?:(?:this|the\s+following"
    rf"|the\s+fact)\s*:\s*)?(?:(?:the\s+fact\s+)?that\s*:?\s+(?=\S))?(?:this\s*:\s*)?"
)
UPDATE = _compiled(
    r"(?:(?:update|correct|amend|edit|revise|overwrite)\b(?:\s+(?:that|this)\s*:)?"
    r"|(?:change|set|modify|rename|fix|adjust|switch)(?=\s+(?:my|our|the\s+(?:note|memory|entry"
    r"|fact)\b|the\s+.{1,60}?\s+to\b))"
    r"|replace(?=\s+.{1,120}?\s+(?:with|by)\b)"
    r"|make\s+(?:that|it)(?=\s+.{1,60}?\b(?:not|instead)\b))"
    rf"{_GAP}"
)

# -- looking at memories --------------------------------------------------------------------------------

RECALL = _compiled(
    r"(?:"
    rf"(?:tell|show|give)\s+me\s+(?:what|everything|all|anything)(?:\s+that)?\s+{_KNOW}"
    rf"|{_WH}(?:\s+\w+){{0,2}}\s+(?:do|did)\s+you\s+(?:still\s+)?(?:know|remember|recall|save|store|note)\b"
    rf"|{_WH}(?:\s+\w+){{0,2}}\s+(?:did|have|had)\s+i\s+(?:ever\s+|just\s+)?(?:tell\s+you|told\s+you"
    rf"|say|said"
    r"|mention(?:ed)?|ask(?:ed)?\s+you\s+to\s+remember|save[d]?|store[d]?|note[d]?)\b"
    rf"|(?:what|which)\s+{_NOTES}\s+(?:do|did|have|are)(?:\s+(?:i|you|we))?(?:\s+(?:have|got|made?|there))?"
    r"|what(?:'s|\s+is)\s+(?:in|stored\s+in)\s+(?:my|your)\s+(?:memory|memories|notes?)"
    r"|(?:have|did|had)\s+i\s+(?:ever\s+|already\s+)?(?:tell|told|mention(?:ed)?|say"
    r"|said)(?:\s+(?:to\s+)?you)?\b"
    r"|(?:do|did|can|will|don't)\s+you\s+(?:still\s+|even\s+)?(?:remember|recall)\b"
    r"|have\s+you\s+forgotten\b|did\s+you\s+forget\b|you\s+(?:do\s+|still\s+)?remember\b"
    r"|do\s+you\s+(?:know|have)\s+(?:anything|something|any\s+notes?)\b"
    r"|recall\b|remind\s+me(?:\s+(?:of|about))?\b"
    rf"|(?:show|list|find|search|look\s+up|look\s+for|look\s+through|search\s+for|search\s+through"
    rf"|get|display|open|read|fetch)\s+"
    rf"(?:me\s+)?(?:through\s+|for\s+|in\s+)?(?=(?:all\s+|everything\b|the\s+|any\s+|my\s+|your\s+"
    rf"|our\s+|what\b)"
    rf".{{0,60}}?(?:\b{_NOTES}\b|\b{_KNOW}\b))"
    r")"
)
REMEMBER_ASKED = _compiled(
    r"remember\s+(?!(?:that|this|to|it)\b|.*:)(?=.*\?\s*$)|remember\s+(?=(?:when|how|where|who|what)\b)"
)

# -- corrections ----------------------------------------------------------------------------------------

CORRECTION = _compiled(
    r"(?:actually|correction|no|nope|wait|hold\s+on|sorry|oops|(?:oh\s+)?my\s+mistake|scratch\s+that"
    r"|scrap\s+that"
    r"|i\s+(?:got|had)\s+(?:that|it|this)\s+wrong|(?:i\s+was|you(?:'re|\s+are)|that(?:'s|\s+is|\s+was))\s+"
    r"(?:wrong|mistaken|not\s+(?:right|true|correct)|incorrect|false)(?:\s+about\s+[^:,;.]{1,80})?"
    r"|i\s+meant(?:\s+to\s+say)?|i\s+(?:made|make)\s+a\s+mistake)(?![\w'])[\s,:;.!–—-]*"
)
STRONG = frozenset({"correction", "scratch that", "scrap that", "i meant", "i meant to say", "my mistake"})
_OWN = r"(?:i|we|my|our|he|she|they|it|his|her|their|the|[A-Z]\w+)"
CHANGED = _compiled(
    rf"{_OWN}\b(?=.*(?:\b(?:any\s?more|any\s+longer|no\s+longer)\b|\bused\s+to\b.*\bnow\b|\bha(?:s"
    rf"|ve)\s+(?:been\s+)?(?:changed|moved|switched)\s+to\b"
    r"|\binstead\s+of\b))|i(?:'ve|\s+have)?\s+(?:stopped|quit|given\s+up)\b(?=.*\bnow\b)"
)
NOT_THAT = _compiled(
    r".{0,200}?\b(?:is|are|was|were|'s|'re|at|in|on|to"
    r"|called)\b.{1,120},\s*(?:and\s+)?not\s+(?:at\s+|in\s+|on\s+)?[\w'-]+(?:\s+[\w'-]+){0,2}\s*[.!]?\s*$"
)

# -- questions, requests, statements --------------------------------------------------------------------

TELL = _compiled(rf"(?:tell|show|explain\s+to)\s+me\s+(?={_WH}\b|whether\b|if\b|about\b)")
WONDER = _compiled(
    r"(?:i\s+(?:wonder|was\s+wondering|am\s+wondering|don't\s+know)|i'm\s+wondering|any\s+idea"
    r"|do\s+you\s+know"
    rf"|i(?:'d|\s+would)?\s+(?:like|want|need)\s+to\s+(?:know|learn|understand|ask))\s+(?=if\b"
    rf"|whether\b|{_WH}\b)"
)
ASKED = _compiled(rf"{_WH}(?:'s|'re|'d|'ll)?(?![\w'])")
WHEN_I = _compiled(rf"(?:when(?:ever)?|while|where|what|how|who)\s+{_SUBJECT}\b[^?]*$")
INVERTED = _compiled(rf"{_AUX}\s+{_SUBJECT}\b")
INVERTED_NAME = re.compile(rf"(?i:{_AUX})\s+[A-Z][\w'-]*\s+(?!(?:is|was|has|will)\b)")
STANDING = _compiled(
    r"(?:from\s+now\s+on|in\s+(?:the\s+)?future|(?:please\s+)?always|never|whenever)\b|(?:call"
    r"|address)\s+me\s+(?!back|later|when|at)"
)
REQUEST = _compiled(
    r"(?:write|translate|summari[sz]e|suggest|help|give|explain|tell|make|draft|create|generate"
    r"|compare|describe|draw|sing"
    r"|play|calculate|compute|solve|convert|rewrite|rephrase|recommend|read|continue|count|think"
    r"|imagine|discuss|define"
    r"|show|list|find|search|look|open|go|check|plan|book|order|send|turn|start|stop|run|fix|build"
    r"|design|let|do|try|use"
    r"|say|answer|ask|call|set|add|put|take|get|change|replace)\s+(?!(?:is|was|are|has)\b)"
)
CHAT = _compiled(
    r"(?:hello|hi|hey|thanks?|thank\s+you|thx|good\s+(?:morning|evening|afternoon|night)|bye|goodbye"
    r"|see\s+you|yes|no|nope"
    r"|yeah|ok|okay|sure|great|cool|nice|wow|lol|sorry|welcome|cheers"
    r"|never\s*mind)(?:[\s,.!]+(?:\w+[\s,.!]*){0,3})?$"
)
STATED = _compiled(
    r"(?:i|i'm|i've|i'll|i'd|we|we're|we've|he|he's|she|she's|they|they're|it|it's|this|that|that's"
    r"|there|there's|my|our|his|her"
    r"|their|your|you|you're|the|a|an|every|each|all|some|most|many|no\s+one|nobody|everyone"
    r"|everybody|last|yesterday|today"
    r"|tomorrow|tonight|on|in|at|when|while|whenever|if|because|since|after|before|these|those"
    r"|just\s+so\s+you\s+know)"
    r"(?:\s+[\w'’(\"-]+[,;:]?){2,}"
)
VERB_LATER = _compiled(
    r"(?:[\w'’-]+\s+){1,7}?(?:is|are|was|were|isn't|aren't|wasn't|has|have|had|will|can|can't|cannot"
    r"|doesn't|don't|didn't|needs?"
    r"|wants?|likes?|loves?|hates?|lives?|works?|owes?|prefers?|knows?|called|moved|went|said|told"
    r"|expires?|comes?|starts?|ends?)\s+\S"
)
NAMED_VERB = re.compile(
    r"[A-Z][\w'’-]+(?:\s+(?:and\s+)?[A-Z][\w'’-]+){0,3}\s+(?:\w+(?:s|ed)|can|will|went|came|got|told)\s+\S"
)

# -- pieces of what is left -----------------------------------------------------------------------------

REFERENCE = _compiled(
    r"(?:(?:all\s+(?:of\s+)?)?(?:it|this|that|these|those|them)|(?:this|that)\s+(?:one|too|please)"
    r"|what\s+(?:i|you)(?:'ve|\s+have)?\s+just\s+(?:said|told\s+(?:you|me)|wrote)"
    r"|the\s+last\s+(?:thing|message)(?:\s+i\s+said)?)\W*$"
)
TOPIC = (
    _compiled(
        rf"(?:everything|anything|all|whatever)(?:\s+(?:of\s+)?(?:the\s+|my\s+"
        rf"|your\s+)?{_NOTES})?(?:\s+(?:that\s+)?{_KNOW})?\s+(?:about|on|of|regarding|concerning|for)\s+"
    ),
    _compiled(
        rf"(?:the\s+|my\s+|your\s+|all\s+|any\s+"
        rf"|our\s+)*(?:old\s+)?{_NOTES}(?:\s+(?:that\s+)?{_KNOW}|\s+do\s+i\s+have)?\s+(?:about|on|of"
        rf"|for|regarding|concerning)\s+"
    ),
    _compiled(
        rf"(?:what|whatever|everything|all|anything)(?:\s+that)?\s+{_KNOW}\s+(?:about|on|of|for"
        rf"|regarding|concerning)\s+"
    ),
    _compiled(r"(?:about|on|regarding|concerning)\s+"),
)
TAIL = _compiled(
    r"(?:\s+(?:(?:from|in|out\s+of)\s+(?:your|my|the)\s+(?:memory|memories|notes?|profile|records?)"
    r"|please|thanks|thank\s+you|now|again)"
    r"|\s*,\s*(?:please|thanks|right|ok))\W*$"
)
EVERYTHING = _compiled(
    rf"(?:everything|all|anything)(?:\s+(?:that\s+)?(?:{_KNOW}|(?:of\s+)?(?:my|your"
    rf"|the)\s+{_NOTES}))?\W*$|(?:all\s+)?(?:my|your)\s+{_NOTES}\W*$"
)
