"""What people say to a memory, and what they mean: written before any rule of the reader.

Conventions: `text` is what is left without command words, politeness and the quotes around a whole quotation;
it is a piece of the utterance, or of the turn before where `that` or `it` points there, and empty where
nothing is named. A text of None is not checked.
"""

from __future__ import annotations

from typing import NamedTuple


class Said(NamedTuple):
    utterance: str
    intent: str
    text: str | None = None
    history: tuple[str, ...] = ()


DOG = ("My dog is called Biscuit.",)

REMEMBER = (
    Said("Remember that my dog is called Biscuit.", "remember", "my dog is called Biscuit."),
    Said("Please remember I am allergic to nuts", "remember", "I am allergic to nuts"),
    Said("Can you remember that I park on level 3?", "remember", "I park on level 3"),
    Said("Could you please make a note that the rent is due on Friday?", "remember"),
    Said("Don't forget that I have a dentist appointment tomorrow.", "remember"),
    Said("don't forget my sister's birthday is 3 May", "remember", "my sister's birthday is 3 May"),
    Said("Do not forget: the alarm code is 4711", "remember", "the alarm code is 4711"),
    Said("Never forget that Anna hates olives", "remember", "Anna hates olives"),
    Said("Note: the wifi password is hunter2", "remember", "the wifi password is hunter2"),
    Said("note to self, buy milk", "remember", "buy milk"),
    Said("Save this: meeting room B is on the second floor", "remember"),
    Said('Remember "the code is 4711".', "remember", "the code is 4711"),
    Said("My favourite colour is green.", "remember", "My favourite colour is green."),
    Said("I live in Lisbon.", "remember", "I live in Lisbon."),
    Said("My name is Zoë 👋", "remember"),
    Said("I work at the post office", "remember"),
    Said("Paris is the capital of France.", "remember"),
    Said("We went to Rome last summer.", "remember"),
    Said("Keep in mind that I don't eat meat.", "remember", "I don't eat meat."),
    Said("Bear in mind I'm colour-blind", "remember", "I'm colour-blind"),
    Said("FYI, the office is closed on Mondays.", "remember", "the office is closed on Mondays."),
    Said("From now on, call me Max.", "remember"),
    Said("Always answer in German.", "remember", "Always answer in German."),
    Said("I forgot my keys at Tom's place yesterday.", "remember"),
    Said("I can't remember names very well.", "remember"),
    Said("Remember that.", "remember", "My dog is called Biscuit.", DOG),
    Said("store the fact that Bob owes me 20 euros", "remember", "Bob owes me 20 euros"),
    Said("write down that the plumber comes at 9", "remember", "the plumber comes at 9"),
    Said("Make sure you remember that we leave at six.", "remember", "we leave at six."),
    Said("I told Anna that I would delete the photos.", "remember"),
)

RECALL = (
    Said("What do you know about my dog?", "recall", "my dog"),
    Said("What do you remember about Anna?", "recall", "Anna"),
    Said("Do you remember my dog's name?", "recall", "my dog's name"),
    Said("Do you remember where I parked?", "recall", "where I parked"),
    Said("What did I tell you about the rent?", "recall", "the rent"),
    Said("What did I say about Paris last week?", "recall"),
    Said("Recall everything about my sister", "recall", "my sister"),
    Said("Remind me what the wifi password is", "recall", "what the wifi password is"),
    Said("remind me of my dentist's address", "recall", "my dentist's address"),
    Said("Show me my notes on the Berlin trip", "recall", "the Berlin trip"),
    Said("List my memories about work", "recall", "work"),
    Said("list everything you remember", "recall", ""),
    Said("Search my memories for 'alarm code'", "recall", "alarm code"),
    Said("Find my notes about taxes, please.", "recall", "taxes"),
    Said("Look up what I said about the plumber", "recall", "the plumber"),
    Said("Have I told you about my new job?", "recall", "my new job"),
    Said("Did I mention my allergy?", "recall", "my allergy"),
    Said("What have I told you about Tom?", "recall", "Tom"),
    Said("Can you recall the name of my doctor?", "recall", "the name of my doctor"),
    Said("What's in your memory about vacations?", "recall", "vacations"),
    Said("Which notes do I have on Kubernetes?", "recall", "Kubernetes"),
    Said("You remember the restaurant we liked, right?", "recall"),
    Said("tell me what you know about Bob", "recall", "Bob"),
    Said("What do you know about me?", "recall", "me"),
    Said("What did I ask you to remember yesterday?", "recall"),
    Said("Have you forgotten my birthday?", "recall", "my birthday"),
    Said("Did you forget where I live?", "recall", "where I live"),
)

UPDATE = (
    Said("Actually, I live in Rome now.", "update", "I live in Rome now."),
    Said("Update my address to 5 Elm Street", "update", "my address to 5 Elm Street"),
    Said("Change my favourite colour to blue.", "update", "my favourite colour to blue."),
    Said("Correction: the meeting is at 4, not 3.", "update", "the meeting is at 4, not 3."),
    Said("No, my dog is called Bruno.", "update", "my dog is called Bruno.", DOG),
    Said("That's wrong, my sister is called Eva", "update", "my sister is called Eva"),
    Said("I don't live in Paris any more.", "update"),
    Said("I no longer work at the post office", "update"),
    Said("Please correct my birthday: it is 4 May.", "update"),
    Said("Replace my old phone number with 555-1234", "update"),
    Said("My address has changed to 7 Oak Lane.", "update"),
    Said("It's Tuesday, not Monday.", "update", "It's Tuesday, not Monday."),
    Said("I was wrong about the rent: it's 900 euros", "update"),
    Said("Sorry, I meant Wednesday", "update"),
    Said("Can you update the note about the plumber? He comes at 10.", "update"),
    Said("Edit my note on Berlin: the trip is in June", "update"),
    Said("I used to like olives but now I hate them", "update"),
    Said("actually my name is spelled Catherine with a C", "update"),
    Said("Scratch that, the party is on Saturday.", "update", "the party is on Saturday."),
    Said("Forget what I said about Friday, the meeting is on Monday.", "update"),
    Said("My flight has been moved to 9 pm instead of 7 pm", "update"),
    Said("Set my home town to Oslo", "update"),
    Said("Amend the memory about Tom: he has two kids", "update"),
    Said("Wait, I got that wrong. The code is 4712.", "update"),
    Said("Make that two kids, not three", "update"),
    Said("I've stopped drinking coffee; I drink tea now.", "update"),
    Said("Please fix my email, it should be zoe@example.org", "update"),
)

FORGET = (
    Said("Forget my old address.", "forget", "my old address"),
    Said("Forget that I live in Paris.", "forget", "I live in Paris"),
    Said("Please forget everything about Tom", "forget", "Tom"),
    Said("Delete my note about the dentist", "forget", "the dentist"),
    Said("delete the memory about the alarm code!", "forget", "the alarm code"),
    Said("Could you remove my phone number from your memory?", "forget", "my phone number"),
    Said("Erase all you know about my ex", "forget", "my ex"),
    Said("Don't remember this: the PIN is 1234", "forget", "the PIN is 1234"),
    Said("Do not remember that I was late.", "forget", "I was late"),
    Said("Do not remember this.", "forget", "My dog is called Biscuit.", DOG),
    Said("Forget that.", "forget", "My dog is called Biscuit.", DOG),
    Said("Forget that.", "forget", ""),
    Said("Forget it.", "forget", ""),
    Said("You can forget my salary now", "forget"),
    Said("I want you to forget what I told you about Anna.", "forget", "Anna"),
    Said("Stop remembering my location", "forget", "my location"),
    Said("Don't store my credit card number.", "forget", "my credit card number"),
    Said("Never remember my passwords", "forget", "my passwords"),
    Said("please do not save what I said about work", "forget", "work"),
    Said("Wipe all my memories", "forget"),
    Said("forget everything", "forget", "everything"),
    Said("Get rid of the note on taxes", "forget", "taxes"),
    Said("Would you mind deleting my birthday?", "forget", "my birthday"),
    Said("Can you please not remember what I just said?", "forget"),
    Said("Discard my notes about the old project.", "forget", "the old project"),
    Said("Unremember the thing about Bob", "forget"),
    Said("Remove 'likes jazz' from my profile", "forget", "likes jazz"),
)

QUESTION = (
    Said("What is my dog called?", "question", "What is my dog called?"),
    Said("where do I live", "question", "where do I live"),
    Said("How do I forget my ex?", "question", "How do I forget my ex?"),
    Said("Why do people forget things?", "question"),
    Said("How can I delete a file in Linux?", "question"),
    Said("Forget about it, what's the capital of Peru?", "question", "what's the capital of Peru?"),
    Said("Forget it, who won the match?", "question", "who won the match?"),
    Said("Is Biscuit a good name for a dog?", "question"),
    Said("Write a poem about my dog.", "question", "Write a poem about my dog."),
    Said("Translate 'remember the milk' into French", "question"),
    Said('What does "forget me not" mean?', "question"),
    Said("Hello!", "question"),
    Said("thanks a lot", "question"),
    Said("Please tell me who wrote Faust.", "question", "who wrote Faust."),
    Said("Could you explain how memory works in the brain?", "question"),
    Said("Can I change my booking?", "question"),
    Said("Should I update my phone?", "question"),
    Said("When is my sister's birthday?", "question"),
    Said("what time is it", "question"),
    Said("Never mind, what's 2 + 2?", "question", "what's 2 + 2?"),
    Said("I wonder whether Anna likes olives", "question"),
    Said("do I like coffee or tea", "question"),
    Said("Summarise the plot of Remember Me", "question"),
    Said("who", "question"),
    Said("👍", "question"),
    Said("Which city did we visit in May 2023?", "question"),
    Said("Is it true that elephants never forget?", "question"),
    Said("My dog is called what again?", "question"),
    Said("مرحبا، كيف حالك؟", "question"),
    Said("Suggest a present for my mother", "question"),
    Said("What should I remember when I pack for Iceland?", "question"),
    Said("Would you delete an angry mail before sending it?", "question"),
    Said("How did the company change its strategy?", "question"),
    Said("Help me write a note to my landlord", "question"),
)

TABLE = REMEMBER + RECALL + UPDATE + FORGET + QUESTION
