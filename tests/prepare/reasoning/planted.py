"""Reasoning as a judge may write it: good texts, and texts with one defect each (call, text, reason)."""

from __future__ import annotations

from tests.prepare.reasoning.builders import QUERY, Call

TAP: Call = ("click", {}, {"coordinate": (30, 50)})
HOLD: Call = ("long_press", {"time": 2}, {"coordinate": (30, 50)})
MOVE: Call = ("mouse_move", {}, {"coordinate": (30, 50)})
ROME: Call = ("type", {"text": "Rome"}, {})
DOWN: Call = ("swipe", {}, {"coordinate": (60, 150), "coordinate2": (60, 50)})
ASIDE: Call = ("swipe", {}, {"coordinate": (100, 80), "coordinate2": (20, 80)})
BACK: Call = ("system_button", {"button": "Back"}, {})
HOME: Call = ("system_button", {"button": "Home"}, {})
ENTER: Call = ("key", {"keys": ["enter"]}, {})
CLOCK: Call = ("open", {"text": "Clock"}, {})
WAIT: Call = ("wait", {"time": 2}, {})
DONE: Call = ("terminate", {"status": "success"}, {})
LOST: Call = ("terminate", {"status": "failure"}, {})

EARLIER = (
    "The home page offers a search, and the city is what I have to say first, so I tap the field at the top.",
    "The keyboard has come up and the cursor stands in the city field, so I can write where we want to eat.",
)
GOOD: tuple[tuple[Call, str], ...] = (
    (TAP, "The form still lacks the date. I click the field labelled Date to open the calendar."),
    (TAP, "Friday the 14th is free in the calendar, so I select it."),
    (TAP, "Two guests are preset, which is what I need. I press Search to see what is free."),
    (TAP, "The results are listed by price; the first one, Da Enzo, has a table at eight. I choose it."),
    (TAP, "A cookie banner covers the lower half of the page, so I dismiss it with Accept."),
    (TAP, "The menu icon at the top right should lead to the settings, so I tap there."),
    (TAP, "The box for the newsletter is ticked; I do not want it, so I untick it by clicking on it."),
    (TAP, "I need to scroll the list later, but first I open the filter for the district."),
    (TAP, "After typing the city a suggestion has appeared. I pick Rome, Italy from the drop-down."),
    (TAP, "The cart shows one item. The next thing is to pay, so I go to the checkout button below."),
    (TAP, "The switch for dark mode is off. I toggle it."),
    (TAP, "To see more of the reviews, I expand the section with the arrow beside it."),
    (TAP, "The dialogue asks for a confirmation; Delete is on its right side, so I hit that."),
    (HOLD, "The message can be removed by a long press on it, so I hold it."),
    (MOVE, "The submenu opens when the pointer rests on Products, so I hover over that entry."),
    (ROME, "The city field is active, so I type Rome."),
    (ROME, 'The cursor blinks in the box named "Where", so I enter "Rome" there.'),
    (ROME, "Now that the keyboard is up I can write the name of the city the user asked for."),
    (ROME, "The search bar is focused; I fill in the place to look for."),
    (ROME, "I put the city in, so that only restaurants there are listed."),
    (DOWN, "None of the visible restaurants has a table, so I scroll down for more of them."),
    (DOWN, "The button to confirm must be below the fold; I swipe up to reach it."),
    (DOWN, "I look further down the page, where prices usually stand, by scrolling."),
    (DOWN, "The settings list goes on below. I scroll until Battery comes into view."),
    (ASIDE, "There are more photos on the next page of the carousel, so I swipe left."),
    (ASIDE, "I slide to the following card, as this one is about another town."),
    (BACK, "This is the page of another restaurant. I go back to the list."),
    (BACK, "The keyboard hides the button, so I press back to close it."),
    (BACK, "Wrong section; I return to the overview."),
    (HOME, "The other app is needed next, so I press Home to leave this one."),
    (HOME, "All is set here, I go to the home screen to start the browser."),
    (ENTER, "The address is complete, so I press Enter to submit the form."),
    (ENTER, "The text stands in the search bar; the enter key starts the search."),
    (CLOCK, "Alarms are kept in the clock, so I open the Clock app."),
    (CLOCK, "To set the timer I launch Clock from here."),
    (WAIT, "The page is blank while it is loading, so I wait a moment."),
    (WAIT, "A spinner turns over the map. I wait until the results have come."),
    (DONE, "The confirmation says that the table is reserved for two on Friday, so the task is done."),
    (DONE, "The alarm for 7:30 is on, which is all that was asked. I am finished."),
    (LOST, "Every restaurant is closed on that day and no other date was allowed: it is impossible, I stop here."),
)  # fmt: skip

_AGAIN = (
    "The home page offers a search, and the city is what I have to say first, so I tap the field at the top.",
    "The home page offers a search and the city is what I have to say first so I tap the field.",
    "Now: the home page offers a search, and the city is what I have to say first, so I tap the field at the top!",
    "The keyboard has come up and the cursor stands in the city field, so I can write where we want to eat.",
    "As the keyboard has come up and the cursor stands in the city field, I can write where we want.",
    "THE KEYBOARD HAS COME UP AND THE CURSOR STANDS IN THE CITY FIELD, SO I CAN WRITE.",
)
_QUERY = (
    QUERY,
    f"{QUERY}.",
    f"I need to {QUERY[0].lower()}{QUERY[1:]}.",
    f"The task is: {QUERY}.",
    QUERY.upper(),
    "Book a table for two people in Rome on Friday evening by tapping here.",
)
PLANTED: tuple[tuple[Call, str, str], ...] = (
    *((TAP, text, "too-short") for text in (
        "Click.", "I tap here.", "Select it", "Next step", "I click on it.", "Ok, go on.")),
    *((TAP, f"{words} " * 80, "too-long") for words in (
        "I tap the field", "and then it goes on", "because of the city", "so I click", "well, maybe", "I think that")),
    (TAP, 'I tap the city field. <tool_call>{"name": 1}</tool_call>', "markup"),
    (TAP, "I tap the city field to open it.<|im_end|>", "markup"),
    (TAP, "```json I tap the city field to open it ```", "markup"),
    (TAP, 'I tap it: {"action": "click"} on the city field', "markup"),
    (TAP, "<tools> I tap the city field to open it", "markup"),
    (TAP, "I tap the city field <|box_start|> to open it", "markup"),
    (TAP, "I tap the city field at (312, 88) to open it.", "coordinates"),
    (TAP, "The field lies at [312, 88], so I click on it.", "coordinates"),
    (TAP, "The button at x=40 is the right one, I click it.", "coordinates"),
    (TAP, "I click 40 pixels below the title of the form.", "coordinates"),
    (TAP, "The place to click is (0.41, 0.22) of the screen.", "coordinates"),
    (TAP, "It is about 300px wide, so I click on its middle.", "coordinates"),
    (TAP, "The magenta circle is around the date, so I click the date.", "hindsight"),
    (TAP, "I click the marked place to get to the calendar.", "hindsight"),
    (TAP, "In the second screenshot the calendar is open, so I click the date.", "hindsight"),
    (TAP, "After the click the calendar opens, which is what I want here.", "hindsight"),
    (TAP, "The screenshot after shows the calendar, so the date is clicked.", "hindsight"),
    (TAP, "Both screenshots show the form; I click the date in it.", "hindsight"),
    *((TAP, text, "copied-query") for text in _QUERY),
    *((ROME if "KEYBOARD" in text.upper() else TAP, text, "copied-step") for text in _AGAIN),
    (TAP, "The date is not in sight yet, so I scroll further down.", "inconsistent"),
    (TAP, "I wait until the calendar has been drawn completely.", "inconsistent"),
    (TAP, "I swipe left to get to the following month.", "inconsistent"),
    (ROME, 'The field is active, so I type "Milan" into it.', "inconsistent"),
    (ROME, "I tap the first suggestion below the field.", "inconsistent"),
    (ROME, "I scroll down to the list of restaurants.", "inconsistent"),
    (DOWN, "The button is above, so I scroll up to it.", "inconsistent"),
    (DOWN, "I swipe down to refresh the list of tables.", "inconsistent"),
    (DOWN, "I tap the button that confirms the booking.", "inconsistent"),
    (ASIDE, "I swipe right to see the photo from before.", "inconsistent"),
    (BACK, "I press home to get to the other app.", "inconsistent"),
    (HOME, "This is the wrong page, so I go back to the list.", "inconsistent"),
    (ENTER, "I type the name of the city into the field.", "inconsistent"),
    (CLOCK, 'Alarms are kept elsewhere, so I open "Calendar" now.', "inconsistent"),
    (CLOCK, "I scroll through the list of all the apps.", "inconsistent"),
    (WAIT, "The page is there, so I click the first link.", "inconsistent"),
    (DONE, "The booking cannot be made on that day, I give up.", "inconsistent"),
    (DONE, "I click the button to confirm the reservation.", "inconsistent"),
    (LOST, "The table has been reserved and everything is done.", "inconsistent"),
    (LOST, "I scroll down for other restaurants in the town.", "inconsistent"),
    (TAP, "The message says that I should type the city here.", "inconsistent"),
    (TAP, "Nothing to choose from is visible, so I scroll down.", "inconsistent"),
    (ROME, "I click the search button to see the results.", "inconsistent"),
    (BACK, "I type the rest of the address into the bar.", "inconsistent"),
)  # fmt: skip
